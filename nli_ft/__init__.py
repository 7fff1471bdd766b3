"""Teach a large language model to reason about natural language inference, and trust the numbers that come out.

Importing nli_ft imports nothing heavy. A name below is fetched from its room when it is first used. `help(nli_ft.fit)`
says more of each: shapes, units, errors and sources. A *room* is one module, made of one notebook in nbs/.

Configs
    load_config(name, overrides)    a config, checked: default.py <- bases <- the file <- overrides
    config_names()                  the configs that come with the package

Rows
    read_rows(path)                 pairs, thoughts or training rows of JSON Lines, CSV or Parquet, checked one by one

Training
    prepare(cfg)                    the rows of a config, chosen, worded and encoded, with their loss masks
    preflight(prep)                 proofs on these rows, steps, and memory, before anything is trained
    fit(prep, model, out)           the training loop: train, save the adapter, go on from a checkpoint
    run_training(cfg)               a whole run with its record, as `nli_train` makes it

Records and scores
    list_runs()                     every record, oldest first
    read_run(folder)                one record: config, environment, summary, metrics, predictions
    evaluate(run)                   a run's model asked on a file: scores, intervals, slices, baselines
    predict(run, premise=…)         a run's answer to pairs of sentences of your own
    compare(entries)                a DataFrame: scores with intervals, paired differences from a baseline

Studies
    Study(name)                     a question with its arms, seeds and prediction: plan, run, report

Errors
    NliError                        what the user can mend. Its kinds are ConfigError, DataError and RecordError

Example, after `nli_run --config cpu_demo`:

    from nli_ft import compare, list_runs
    run = list_runs()[-1]["path"]
    compare([run, f"{run}:before"])

`preflight`, `fit`, `evaluate`, `predict` and `compare` are also the names of rooms (`nli_ft/evaluate.py`). So each of
these is a module that can be called. `nli_ft.evaluate(run)` does what stands above, and `from nli_ft.evaluate import
score` still finds what is in the room.
"""

# Written by hand, because it is the package's face. nbdev_export sets the version in the next line and leaves the rest
# alone. Every other module is exported from a notebook.
__version__ = "0.1.0"

import sys
from types import ModuleType

TYPE_CHECKING = False  # editors, which read this file and do not run it, take it for true
if TYPE_CHECKING:  # so they offer names and parameters
    from .ask import evaluate_run as evaluate, predict_pairs as predict
    from .compare import compare_frame as compare
    from .config_loader import config_names, load_config
    from .fit import fit
    from .preflight import preflight, prepare
    from .process import ConfigError, DataError, NliError, RecordError
    from .records import list_runs, read_run
    from .rows import read_rows
    from .study import Study
    from .train_sft import run_training

# name here -> room:name there. The name differs only where the room's own one says more than a reader here needs
_FACE = dict(
    load_config="config_loader:load_config",
    config_names="config_loader:config_names",
    read_rows="rows:read_rows",
    prepare="preflight:prepare",
    preflight="preflight:preflight",
    fit="fit:fit",
    run_training="train_sft:run_training",
    list_runs="records:list_runs",
    read_run="records:read_run",
    evaluate="ask:evaluate_run",
    predict="ask:predict_pairs",
    compare="compare:compare_frame",
    Study="study:Study",
    NliError="process:NliError",
    ConfigError="process:ConfigError",
    DataError="process:DataError",
    RecordError="process:RecordError",
)
__all__ = [*_FACE, "__version__"]


def _found(name):
    "What a name of the face stands for, from its room."
    import importlib

    room, own = _FACE[name].split(":")
    return getattr(importlib.import_module(f"nli_ft.{room}"), own)


# A package has one attribute for a name. `from nli_ft import fit`, `nli_ft.fit.fit` and `import nli_ft.fit as room`
# all ask for the attribute `fit`, and importing the room puts it there. So one object must be both: the room, which can
# be called. If the function were put there instead, the other two forms would find no room.
class _CalledRoom(ModuleType):
    "A room with the name of a function of the face. Calling the room calls the function."

    def __reduce__(self):
        "A pool of processes can be given `evaluate` as it can be given any function."
        import importlib

        return importlib.import_module, (self.__name__,)

    def __call__(self, *args, **options):
        return _found(self.__name__.rpartition(".")[2])(*args, **options)

    @property
    def __signature__(self):
        import inspect

        return inspect.signature(_found(self.__name__.rpartition(".")[2]))

    @property
    def __doc__(self):
        import inspect

        name = self.__name__.rpartition(".")[2]
        room, own = _FACE[name].split(":")
        text = f"{inspect.getdoc(_found(name))}\n\nCall it as {name}{self.__signature__}: it is nli_ft.{room}.{own}."
        return f"{text}\n\nThe room nli_ft.{name}: {vars(self)['__doc__']}"


class _Package(ModuleType):
    "This package. When a room that is also a function of the face is imported, it becomes one that can be called."

    def __setattr__(self, name, value):
        if name in _FACE and type(value) is ModuleType:
            value.__class__ = _CalledRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name not in _FACE:
        raise AttributeError(f"module 'nli_ft' has no attribute {name!r}")
    import importlib.util

    if importlib.util.find_spec(f"nli_ft.{name}"):  # a room, which the import puts here
        import importlib

        return importlib.import_module(f"nli_ft.{name}")
    value = _found(name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_FACE})
