"""nli_train in processes that shard the model (FSDP 1) over gloo, on a machine without a GPU: `torchrun …
tests/fsdp_on_cpu.py ARGS`.

accelerate 1.15 shards on accelerators only, so this script says to its state that the CPU is one. Three more
things assume a GPU. A barrier names its device. Gathered weights move to the CPU by freeing their first copy.
`check_ready` refuses. All else is what a GPU runs."""

import contextlib, functools, json, os, sys

import torch.distributed
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp._flat_param import FlatParamHandle

import nli_ft.fit
import nli_ft.ready
import nli_ft.train_sft

start, barrier, missing = AcceleratorState.__init__, torch.distributed.barrier, nli_ft.ready._missing_for_fsdp


def with_plugin(self, *a, fsdp_plugin=None, **kw):
    start(self, *a, fsdp_plugin=fsdp_plugin, **kw)
    if fsdp_plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
        return
    self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if self._mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(self._mixed_precision)
    self.fsdp_plugin, self.device, PartialState._shared_state["device"] = (
        fsdp_plugin,
        *[torch.device("cpu")] * 2,
    )  # not cpu:0, which FSDP takes for another


AcceleratorState.__init__ = functools.wraps(start)(with_plugin)
torch.distributed.barrier = lambda *a, device_ids=None, **kw: barrier(*a, **kw)
FlatParamHandle.to_cpu = lambda self: contextlib.nullcontext()
nli_ft.ready._missing_for_fsdp = lambda cfg: [l for l in missing(cfg) if "needs CUDA" not in l]
nli_ft.ready._missing_device = lambda cfg: []

if os.environ.get("SHARDS_TO"):  # write down what was sharded, and how
    made = nli_ft.fit._trainer

    def noted(*a, **kw):
        trainer = made(*a, **kw)
        from transformers import TrainerCallback

        class Note(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kw):
                from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

                units = [
                    (min(p._fqns), str(p.dtype), p.requires_grad, p.numel())
                    for p in (u._flat_param for u in FSDP.fsdp_modules(model) if u._has_params)
                ]
                rotary = sorted({str(b.dtype) for n, b in model.named_buffers() if "inv_freq" in n})
                with open(f"{os.environ['SHARDS_TO']}.{os.environ['RANK']}", "w") as f:
                    json.dump(dict(units=units, rotary=rotary), f)

        trainer.add_callback(Note())
        return trainer

    nli_ft.fit._trainer = noted

nli_ft.train_sft.train_cli(sys.argv[1:])
