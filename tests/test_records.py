"""Run records across processes and faults: real kernels, tiny notebooks, a project of their own in a temporary folder."""
import json,os,shutil,signal,subprocess,sys,time
from pathlib import Path

import nbformat,pytest

from nli_ft import records
from nli_ft.config_loader import RecordError,load_config

ROOT = Path(__file__).resolve().parents[1]
OPEN = "from nli_ft.config_loader import load_config\nfrom nli_ft.records import append_metrics,finish_run,start_run\n" \
       "run = start_run(load_config(config, overrides), run_dir)"
STEP = "append_metrics(run, {'step':1, 'loss':2.0})"
CLOSE = "finish_run(run, before={'accuracy':.125, 'valid_rate':.0, 'n':8}, after={'accuracy':.875, 'valid_rate':1., 'n':8})"

@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project: settings.ini and nbs/. Commands run in it use this checkout's package."
    for name in ("settings.ini","requirements.txt"):
        if (ROOT/name).exists(): shutil.copy(ROOT/name, tmp_path)
    (tmp_path/"nbs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path

def notebook(project, *cells, tag="parameters"):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec":{"name":"python3","display_name":"python3","language":"python"}})
    nb.cells = [nbformat.v4.new_code_cell(c) for c in ('config = "default"\noverrides = ""\nrun_dir = None', *cells)]
    if tag: nb.cells[0].metadata["tags"] = [tag]
    nbformat.write(nb, project/"nbs"/"train.ipynb")

def nli_run(*args, cwd=None, **env):
    return subprocess.run([sys.executable,"-m","nli_ft.records",*args], cwd=cwd, env=os.environ|env, capture_output=True, text=True, timeout=120)

def runs(project): return records.list_runs(project/"runs")

def left_behind(project):
    "Processes other than this one that still live in `project`."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(p/"cwd").startswith(str(project)) and int(p.name)!=os.getpid(): found.append((p/"cmdline").read_text())
        except OSError: pass
    return found

# -- folders and files

def test_runs_started_in_the_same_second_by_many_processes_never_share_a_folder(project):
    code = "from nli_ft.config_loader import load_config\nfrom nli_ft.records import new_run_dir\n" \
           "c=load_config('minimal_test')\nfor _ in range(20): print(new_run_dir(c,'runs'))"
    procs = [subprocess.Popen([sys.executable,"-c",code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    made = [line for p in procs for line in p.communicate(timeout=60)[0].split()]
    assert len(made)==60==len(set(made))

def test_of_several_runs_that_adopt_one_folder_only_the_first_gets_it(project):
    cfg = load_config("minimal_test")
    run = records.new_run_dir(cfg)
    assert records.start_run(cfg, run)==run
    before = (run/"config.json").read_text()
    with pytest.raises(RecordError, match="already holds a run"): records.start_run(cfg, run)
    assert (run/"config.json").read_text()==before

def test_a_folder_with_other_files_is_not_adopted(project):
    (project/"precious").mkdir(); (project/"precious"/"thesis.tex").write_text("x")
    with pytest.raises(RecordError, match="thesis.tex"): records.start_run(load_config("minimal_test"), "precious")
    assert os.listdir(project/"precious")==["thesis.tex"]

def test_a_full_disk_leaves_the_old_summary_and_no_litter(project, monkeypatch):
    run = records.start_run(load_config("minimal_test"), command="x")
    before = (run/"summary.json").read_text()
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"): records.finish_run(run, after={"accuracy":1.})
    assert (run/"summary.json").read_text()==before and not list(run.glob(".*"))

def test_metrics_are_readable_after_every_cut(project):
    run = records.new_run_dir(load_config("minimal_test"), "runs")
    for i in range(3): records.append_metrics(run, {"step":i, "text":"é"})
    whole = (run/"metrics.jsonl").read_bytes()
    for cut in range(len(whole)+1):
        (run/"metrics.jsonl").write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        records.append_metrics(run, {"step":99})
        assert [r["step"] for r in records.read_metrics(run)]==[*range(kept), 99]

def test_a_run_whose_process_is_gone_is_listed_as_died_and_a_living_one_as_running(project):
    code = "from nli_ft.config_loader import load_config\nfrom nli_ft.records import start_run\nstart_run(load_config('minimal_test'))"
    subprocess.run([sys.executable,"-c",code], check=True)
    mine = records.start_run(load_config("minimal_test"))
    by_id = {r["run_id"]:r["status"] for r in runs(project)}
    assert by_id.pop(mine.name)=="running" and list(by_id.values())==["died"]

@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"status":"done"}', '{"status":"done","started":"x","after":3}', "\x00\xff"])
def test_an_unreadable_record_is_listed_with_the_reason_and_hides_no_other(project, text):
    good = records.start_run(load_config("minimal_test"))
    records.finish_run(good, after={"accuracy":.5})
    bad = project/"runs"/"c"/"r"; bad.mkdir(parents=True)
    (bad/"summary.json").write_bytes(text.encode("latin1"))
    rows = {r["run_id"]:r for r in runs(project)}
    assert rows[good.name]["accuracy"]==.5 and rows["r"]["status"]=="unreadable" and "summary.json" in rows["r"]["why"]
    with pytest.raises(RecordError, match="config.json"): records.read_run(bad)

def test_environment_names_versions_and_hashes_but_no_value_host_or_path(project, monkeypatch):
    data = project/"data"/"finetune"; data.mkdir(parents=True)
    (data/"dev_ft.jsonl").write_text('{"id":"1","premise":"p","hypothesis":"h","label":1}\n')
    monkeypatch.setenv("HF_TOKEN", "planted-secret-1")
    env = records.environment(load_config("default", "prompt_template=brief"))
    text = json.dumps(env)
    assert env["env"]["HF_TOKEN"] is True and "planted" not in text and str(project) not in text and str(ROOT) not in text
    assert env["data"]["eval"]["rows"]==1 and len(env["data"]["eval"]["sha256"])==64 and env["data"]["train"]["sha256"] is None
    assert env["packages"]["nbdev"] and len(env["prompt"]["sha256"])==64

# -- the launcher

def test_a_run_is_recorded_by_this_python_and_its_scores_are_reported(project):
    decoy = project/"share"/"kernels"/"python3"; decoy.mkdir(parents=True)
    (decoy/"kernel.json").write_text(json.dumps(dict(argv=["/bin/false","{connection_file}"], display_name="decoy", language="python")))
    notebook(project, OPEN, "import sys,os\nappend_metrics(run, {'exe':sys.executable, 'cwd':os.path.relpath(os.getcwd())})\nprint('step 1 of 1')", CLOSE)
    (project/"elsewhere").mkdir()
    out = nli_run("--config","minimal_test","--learning_rate","1e-4","--train_data","mine.jsonl", cwd=project/"elsewhere",
                  JUPYTER_PATH=str(project/"share"))
    assert out.returncode==0, out.stderr
    assert "step 1 of 1" in out.stdout and "0.125" in out.stdout and "0.875" in out.stdout
    [row] = runs(project)
    run = records.read_run(row["path"])
    assert run.metrics==[{"exe":sys.executable, "cwd":"."}]
    assert run.cfg.learning_rate==1e-4 and run.cfg.train_data=="elsewhere/mine.jsonl"
    assert row["path"].removeprefix(str(project)+"/") in out.stdout and row["status"]=="done"
    executed = (run.path/"train.ipynb").read_text()
    assert str(project) not in executed and '"execution_count": null' not in executed

def test_configs_times_seeds_each_get_a_record(project):
    notebook(project, OPEN, CLOSE)
    out = nli_run("--config","minimal_test","cpu_demo","--seeds","1,2")
    assert out.returncode==0, out.stderr
    assert sorted((r["config"],r["seed"]) for r in runs(project))==[(c,s) for c in ("cpu_demo","minimal_test") for s in (1,2)]

def test_a_failed_run_keeps_its_notebook_with_the_error_and_the_next_one_still_runs(project):
    notebook(project, OPEN, STEP, "if run.parent.name=='minimal_test': raise RuntimeError('loss is nan')", CLOSE)
    out = nli_run("--config","minimal_test","cpu_demo")
    assert out.returncode==1 and "loss is nan" in out.stderr and "Traceback" not in out.stderr
    by = {r["config"]:r for r in runs(project)}
    assert by["minimal_test"]["status"]=="failed" and by["minimal_test"]["why"]=="RuntimeError: loss is nan" and by["cpu_demo"]["status"]=="done"
    assert "loss is nan" in (Path(by["minimal_test"]["path"])/"train.ipynb").read_text()

def test_bad_data_found_by_the_notebook_is_exit_code_2(project):
    notebook(project, "from nli_ft.config_loader import DataError\nraise DataError('no such rows: x.jsonl')")
    out = nli_run("--config","minimal_test")
    assert out.returncode==2 and "no such rows: x.jsonl" in out.stderr
    assert [(r["status"],r["why"]) for r in runs(project)]==[("failed","no such rows: x.jsonl")]

def test_the_same_error_after_training_began_is_exit_code_1(project):
    notebook(project, OPEN, STEP, "from nli_ft.config_loader import DataError\nraise DataError('rows went away')")
    assert nli_run("--config","minimal_test").returncode==1

@pytest.mark.parametrize("cells,why", [([STEP.replace("append","#")], "start_run"), ([OPEN], "finish_run")])
def test_a_notebook_that_leaves_its_record_open_is_a_failed_run(project, cells, why):
    notebook(project, *cells)
    out = nli_run("--config","minimal_test")
    assert out.returncode==1 and why in out.stderr and [r["status"] for r in runs(project)]==["failed"]

def test_a_killed_kernel_is_a_failed_run_and_takes_its_children_with_it(project):
    notebook(project, OPEN, "import subprocess,os,signal\nsubprocess.Popen(['sleep','61.2525'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\nos.kill(os.getpid(), signal.SIGKILL)")
    out = nli_run("--config","minimal_test")
    assert out.returncode==1 and "kernel died" in out.stderr
    assert [r["status"] for r in runs(project)]==["failed"] and not left_behind(project)

def _started(project, cells):
    "A running `nli_run` that has reached its training cell."
    notebook(project, *cells)
    p = subprocess.Popen([sys.executable,"-m","nli_ft.records","--config","minimal_test"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if list(project.glob("runs/*/*/metrics.jsonl")): return p
        time.sleep(.1)
    p.kill(); raise AssertionError("never started")

@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_kernel_which_closes_its_record(project, sig):
    p = _started(project, [OPEN, "import time\ntry:\n    "+STEP+"\n    time.sleep(62.5252)\nexcept KeyboardInterrupt:\n"
                                 "    finish_run(run, 'interrupted', saved_step=7); raise"])
    p.send_signal(sig)
    out,err = p.communicate(timeout=60)
    assert p.returncode==128+sig, err
    [row] = runs(project)
    assert row["status"]=="interrupted" and records.read_run(row["path"]).summary["saved_step"]==7
    assert "KeyboardInterrupt" in (Path(row["path"])/"train.ipynb").read_text() and not left_behind(project)

def test_a_kernel_that_dies_of_the_schedulers_signal_is_an_interrupted_run(project):
    p = _started(project, [OPEN, STEP+"\nimport os,signal,time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: os.kill(os.getpid(), signal.SIGTERM)"])
    p.send_signal(signal.SIGTERM)
    out,err = p.communicate(timeout=60)
    [row] = runs(project)
    assert p.returncode==143 and row["status"]=="interrupted" and "stopped by SIGTERM" in row["why"], err

def test_a_second_signal_ends_a_kernel_that_does_not_listen(project):
    p = _started(project, [OPEN, "import time,signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"+STEP+"\nwhile True: time.sleep(.1)"])
    p.send_signal(signal.SIGINT); time.sleep(1); p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=60)
    assert p.returncode==130 and [r["status"] for r in runs(project)]==["interrupted"] and not left_behind(project)

def test_a_lost_parameters_tag_is_refused_before_a_folder_is_made(project):
    notebook(project, OPEN, CLOSE, tag=None)
    out = nli_run("--config","minimal_test")
    assert out.returncode==2 and "train.ipynb" in out.stderr and "allowed_cell_metadata_keys" in out.stderr
    assert not (project/"runs").exists()

@pytest.mark.parametrize("args", [("minimal_test","cpu_dem"), ("minimal_test","--learning_rate","-1"), ("minimal_test","--seeds","1,x")])
def test_one_bad_config_of_several_stops_all_before_the_first(project, args):
    notebook(project, OPEN, CLOSE)
    out = nli_run("--config",*args)
    assert out.returncode==2 and "Traceback" not in out.stderr and not (project/"runs").exists()

def test_dry_run_prints_the_command_and_makes_nothing(project):
    notebook(project, OPEN, CLOSE)
    out = nli_run("--config","minimal_test","--max_steps","3","--seeds","1,2","--dry_run")
    assert out.returncode==0 and out.stdout.count("papermill nbs/train.ipynb")==2 and "max_steps=3" in out.stdout
    assert not (project/"runs").exists()

def test_no_planted_secret_reaches_any_file_of_a_record(project):
    planted = dict(HF_TOKEN="planted-hf-secret", WANDB_API_KEY="planted-wandb-\"secret\"", MY_PASSWORD="planted-pässword")
    leak = "import os\nprint(os.environ['HF_TOKEN'])\nappend_metrics(run, {'note':os.environ['MY_PASSWORD']})\n" \
           "raise RuntimeError('401 for '+os.environ['WANDB_API_KEY'])"
    notebook(project, OPEN, leak)
    out = nli_run("--config","minimal_test",**planted)
    assert out.returncode==1
    files = [f for f in (project/"runs").rglob("*") if f.is_file()]
    assert {f.name for f in files}=={"config.json","environment.json","metrics.jsonl","summary.json","train.ipynb"}
    for f in files:
        assert "planted-" not in f.read_text(), f.name
    assert "[HF_TOKEN removed]" in (files[0].parent/"train.ipynb").read_text()

# -- comparing what runs left

def finished(config="minimal_test", right=lambda i: i%4>0, n=60, overrides="", seed=42, **changed):
    "A finished record of the project of now; `changed` replaces keys of every prediction row."
    cfg = load_config(config, overrides).replace(seed=seed)
    run = records.start_run(cfg)
    rows = [dict(id=i, premise=f"p {i//2}", hypothesis=f"h {i}", label=i%2, predicted_label=i%2 if right(i) else 1-i%2, outcome="strict", repairs=[], completion="{}",
                 thought_process="so", p_entail=.5, n_tokens=9, finish="stop", seconds=.1, mode="cot", prompt_hash="x", group_id=i//2) | changed for i in range(n)]
    (run/"predictions.jsonl").write_text("".join(json.dumps(r)+"\n" for r in rows))
    records.append_metrics(run, {"step":1, "loss":1.})
    records.finish_run(run, after={"accuracy":.75, "n":n})
    return run

def nli_compare(*args):
    code = "import sys; from nli_ft.records import compare_cli; sys.exit(compare_cli(sys.argv[1:]))"
    return subprocess.run([sys.executable,"-c",code,*map(str,args)], capture_output=True, text=True, timeout=120)

@pytest.mark.parametrize("changed,why", [({"label":1,"predicted_label":1},"labels"), ({"prompt_hash":"y"},"prompts"), ({"premise":"another"},"items"), ({"hypothesis":"another"},"items")])
def test_runs_on_another_task_are_not_compared(project, changed, why):
    with pytest.raises(RecordError, match=f"different {why}"): records.compare_runs([finished(), finished(**changed)])

def test_runs_on_other_ids_are_not_compared_however_many_they_share(project):
    with pytest.raises(RecordError, match="60 and 59; 1 of them, such as '59'"): records.compare_runs([finished(), finished(n=59)])

@pytest.mark.parametrize("damage,why", [
    (lambda r: (r/"predictions.jsonl").unlink(), "predictions.jsonl is missing"), (lambda r: (r/"config.json").unlink(), "config.json is missing"),
    (lambda r: (r/"environment.json").write_text("{"), "environment.json cannot be read"),
    (lambda r: (r/"predictions.jsonl").write_text((r/"predictions.jsonl").read_text()*2), "occurs more than once"),
    (lambda r: (r/"predictions.jsonl").write_text((r/"predictions.jsonl").read_text().replace("0.5","NaN",1)), "not a probability"),
    (lambda r: (r/"predictions.jsonl").write_text((r/"predictions.jsonl").read_text()[:-9]), "not JSON"),
    (lambda r: shutil.rmtree(r), "no folder"), (lambda r: records._write_json(r/"summary.json", records._read_json(r/"summary.json")|records._running(load_config())), "still going")])
def test_a_damaged_or_unfinished_record_is_refused_by_name(project, damage, why):
    good,bad = finished(), finished()
    damage(bad)
    out = nli_compare(good, bad)
    assert out.returncode==2 and why in out.stderr and bad.name in out.stderr and "Traceback" not in out.stderr

def test_row_order_in_the_predictions_file_does_not_matter(project):
    a,b = finished(), finished(right=lambda i: i*i%7>1)
    before = records.compare_runs([a,b])[1]
    lines = (b/"predictions.jsonl").read_text().splitlines(keepends=True)
    (b/"predictions.jsonl").write_text("".join(lines[1::2]+lines[::2]))
    assert records.compare_runs([a,b])[1]==before

def test_the_comparison_equals_one_worked_out_by_hand(project):
    "Of 60 items 10 are right only in b, 2 only in a: the difference is 8/60, McNemar's p two tails of twelve coin tosses."
    import math
    only_b,only_a = range(0,20,2), (21,23)
    a,b = finished(right=lambda i: i not in only_b), finished(right=lambda i: i not in only_a, overrides="lora_r=4")
    c = finished(right=lambda i: i not in only_b, overrides="lora_r=2")
    _,rb,rc = records.compare_runs([a,b,c])
    p = 2*sum(math.comb(12,k) for k in range(3))/2**12
    assert abs(rb["difference"]-8/60)<1e-12 and abs(rb["p"]-p)<1e-12 and abs(rb["p_holm"]-2*p)<1e-12 and rb["ci"][0]<8/60<rb["ci"][1]
    assert rc["difference"]==0 and rc["p"]==1 and rc["p_holm"]==1 and "no difference" in rc["verdict"]

def test_a_comparison_that_differs_in_two_settings_warns_and_in_one_does_not(project):
    a,b,c = finished(), finished(overrides="lora_r=4"), finished(overrides="lora_r=4 learning_rate=5e-4")
    assert "warning" not in nli_compare(a,b).stdout
    out = nli_compare(a,c).stdout
    assert "warning" in out and "lora_r, learning_rate" in out

def test_a_training_file_that_changed_under_its_name_is_a_difference_and_a_moved_one_is_not(project):
    for name in ("a","b"): (project/f"{name}.jsonl").write_text('{"id":1,"premise":"p","hypothesis":"h","label":1}\n')
    one,moved = finished(overrides="train_data=a.jsonl"), finished(overrides="train_data=b.jsonl")
    (project/"a.jsonl").write_text('{"id":1,"premise":"p","hypothesis":"h","label":0}\n')
    changed = finished(overrides="train_data=a.jsonl")
    assert [r["differs"] for r in records.compare_runs([one,moved,changed])[1:]]==[[], ["train_data (same path, other content)"]]

def test_all_seeds_of_configs_are_compared_config_by_config_and_written_once(project):
    for seed in (1,2,3):
        finished("minimal_test", seed=seed); finished("cpu_demo", right=lambda i: i!=seed, seed=seed)
    out = nli_compare("--all","minimal_test","cpu_demo","--out","table.md")
    assert out.returncode==0 and "cpu_demo: +23.3 points: can be told from noise over 3 and 3 seeds and 60 items" in out.stdout
    assert (project/"table.md").read_text().count("| cpu_demo")==4
    again = nli_compare("--latest","minimal_test","cpu_demo","--out","table.md")
    assert again.returncode==2 and "exists already" in again.stderr
    assert json.loads(nli_compare("--latest","minimal_test","cpu_demo","--json").stdout)["runs"][1]["config"]=="cpu_demo"
    assert nli_compare("--latest","minimal_test","ablation2").returncode==2

def test_runs_on_copies_of_the_same_data_are_repetitions_of_one_config(project):
    for name in ("a","b","c"): (project/f"{name}.jsonl").write_text('{"id":1,"premise":"p","hypothesis":"h","label":%d}\n' % (name=="c"))
    runs = [finished(seed=s, overrides=f"train_data={f}.jsonl") for s,f in ((1,"a"),(2,"b"),(3,"c"))]
    assert [r["seeds"] for r in records.compare_configs(runs)]==[[1,2],[3]]

def test_the_untrained_model_of_a_run_can_be_its_baseline(project):
    run = finished()
    shutil.copy(run/"predictions.jsonl", run/"predictions_before.jsonl")
    rows = records.compare_runs([f"{run}:before", run])
    assert rows[0]["run"].endswith(":before") and rows[1]["differs"]==["training"]

def test_a_model_card_says_only_what_the_record_says(project):
    run = finished(outcome="repaired")
    card = records.model_card(run)
    for said in ("0.750 [0.628, 0.842]", "n=60", "One seed (42)", "100.0% of the answers were no valid JSON", "not recorded", "lora_r"): assert said in card
    assert (run/"MODEL_CARD.md").read_text()==card and str(project) not in card

def test_the_model_card_is_a_command_too(project, capsys):
    run = finished()
    assert records.runs_cli([str(run),"--card"])==0 and capsys.readouterr().out.strip()==(run/"MODEL_CARD.md").read_text().strip()
    with pytest.raises(SystemExit) as e: records.runs_cli(["--card"])
    assert e.value.code==2 and "name the record's folder" in capsys.readouterr().err

@pytest.mark.parametrize("make", [lambda: [], lambda: [finished()], lambda: [finished(), finished(n=20), finished(seed=7, right=lambda i: True)]])
def test_the_comparison_notebook_runs_whatever_there_is(project, make):
    import papermill
    made = make()
    nb = papermill.execute_notebook(str(ROOT/"nbs"/"compare.ipynb"), str(project/"out.ipynb"), cwd=str(project), progress_bar=False)
    text = json.dumps(nb)
    assert ("image/png" in text)==(len(made)>1)
    if len(made)>1: assert "left out:" in text and "2 runs are compared" in text and "can be told from noise" in text
