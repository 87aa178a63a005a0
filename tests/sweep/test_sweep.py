"""Sweeps: what the cells are, what is kept of them, and that neither workers nor interruptions change it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from causal_probe import CausalProbeError, experiments, graphs, hooks, models, probes, tasks, training
from causal_probe.results import hold, seal, write_json
from causal_probe.sweep import Outcome, sweep
from causal_probe.sweep.cells import PROBES, step_of
from causal_probe.sweep.plan import Cell, fingerprint, plan, read_spec
from causal_probe.sweep.result import Sweep
from causal_probe.sweep.store import COLUMNS, METADATA, Store, encode
from tests import tiny_huggingface

SPEC = {
    "probes": "gradient",
    "grid": {"graph_seed": [0, 1], "seed": [0, 1]},
    "settings": {"graph": "forest", "n_positions": 6, "n_sequences": 64},
}


def contents(folder):
    """The bytes of every finished cell, by its name."""
    return {path.name: path.read_bytes() for path in (folder / "cells").iterdir()}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.parquet")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The sweep of SPEC, in this process."""
    return sweep(SPEC, out=tmp_path_factory.mktemp("done") / "out")


# --------------------------------------------------------------------------------------------------------------- the plan


def probe(*, seed: int, a: int = 0, b: int = 0) -> Outcome:
    return Outcome([{"layer": 0, "head": a, "score": float(b)}], {"threads": torch.get_num_threads(), "a": a})


def test_a_grid_is_a_product_and_cells_are_a_list():
    grid = plan({"probes": ["p", "q"], "grid": {"a": [1, 2], "b": 3, "seed": [0, 1]}}, {"p": probe, "q": probe})
    assert [(cell.probe, cell.options["a"], cell.seed) for cell in grid] == [
        ("p", 1, 0), ("q", 1, 0), ("p", 1, 1), ("q", 1, 1), ("p", 2, 0), ("q", 2, 0), ("p", 2, 1), ("q", 2, 1)
    ]  # fmt: skip
    both = plan({"probes": "p", "cells": [{"a": 1}, {"a": 2}], "grid": {"seed": [5, 6]}}, {"p": probe})
    assert [(cell.options["a"], cell.seed) for cell in both] == [(1, 5), (1, 6), (2, 5), (2, 6)]
    own = plan(
        {"probes": {"p": {"b": 7}, "q": None}, "grid": {"a": [1]}, "settings": {"b": 1}}, {"p": probe, "q": probe}
    )
    assert [cell.options for cell in own] == [{"a": 1, "b": 7}, {"a": 1, "b": 1}]


def test_the_key_is_of_what_is_said_and_not_of_how():
    one, other = Cell("p", 0, {"a": 1, "b": [2]}, 1, {}), Cell("p", 0, {"b": [2], "a": 1}, 1, {})
    assert one.key == other.key
    assert (
        len({Cell("p", seed, {"a": a}, threads, {}).key for seed in (0, 1) for a in (0, 1) for threads in (1, 2)}) == 8
    )


def test_derived_seeds_differ_unless_only_the_model_does():
    cells = [Cell("p", seed, {"a": a}, 1, {}) for seed in range(50) for a in range(50)]
    assert len({cell.derived_seed for cell in cells}) == len(cells)
    first, second = (Cell("p", 0, {"a": 1, "model": name}, 1, {"model": name}) for name in ("step1", "step2"))
    assert first.key != second.key
    assert first.derived_seed == second.derived_seed


def test_a_changed_file_is_another_cell(tmp_path):
    path = tmp_path / "graph.json"
    keys = set()
    for text in ("{}", "[]"):
        path.write_text(text)
        keys |= {cell.key for cell in plan({"probes": "gradient", "grid": {"graph": [str(path)]}}, PROBES)}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"probe": "p"}, "also says probe"),
        ({"probes": "nothing", "grid": {"a": [1]}}, "There is no probe nothing for a sweep. There are p"),
        ({"probes": [], "grid": {"a": [1]}}, "needs probes"),
        ({"probes": "p"}, "needs points"),
        ({"probes": "p", "grid": {"a": []}}, "no values for a"),
        ({"probes": "p", "grid": {"c": [1]}}, "The probe p has no option c. Its options are a, b and seed"),
        ({"probes": "p", "grid": {"a": [1]}, "setings": {}}, "did you mean settings"),
        ({"probes": "scna", "grid": {"model": ["m"]}}, "There is no probe scna for a sweep; did you mean scan"),
        ({"probes": "scan", "grid": {"modle": ["m"]}}, "has no option modle; did you mean model"),
        (
            {"probes": "scan", "grid": {"model": ["m"], "period": ["6"]}},
            "The probe scan: `period` is '6'. It must be a whole number of at least 1 or None",
        ),
        (
            {"probes": "scan", "grid": {"model": ["m"], "seed": [0]}, "settings": {"bos": True}},
            "The probe scan: `bos` is True. It must be 'auto' or 'yes' or 'no'",
        ),
        (
            {"probes": "p", "grid": {"a": [1], "b": [2]}, "settings": {"b": 1}},
            "b is said both by the grid and by settings",
        ),
        ({"probes": {"p": {"b": 1}}, "grid": {"b": [2]}}, "by the grid and by the settings of p"),
        ({"probes": "p", "grid": {"a": [1, 1]}}, "holds a cell twice"),
        ({"probes": "p", "grid": {"a": [1]}, "cells": [{"a": 2}]}, "both by the grid and by a cell"),
        ({"probes": "p", "grid": {"seed": [-1]}}, "at least 0, not -1"),
        ({"probes": "p", "grid": {"seed": [True]}}, "not True"),
        ({"probes": "p", "grid": [1]}, "grid must be a mapping"),
        ({"probes": "p", "cells": {"a": 1}}, "cells must be a list"),
        ({"probes": "p", "grid": {"a": [1]}, "threads": 0}, "threads"),
        ({"probes": "scan", "grid": {"seed": [0]}}, "The probe scan needs model"),
        ({"probes": "p", "grid": {"a": [float("nan")]}}, "NaN|nan"),
        ({"probes": "p", "grid": {"a": range(10**6), "seed": range(10**6)}}, "1,000,000,000,000 cells, more than"),
    ],
)
def test_a_spec_that_makes_no_sense(spec, message):
    with pytest.raises(CausalProbeError, match=message):
        plan(spec, PROBES if spec.get("probes") in ("scan", "scna") else {"p": probe})


def test_the_whole_of_a_large_file_is_looked_at(tmp_path):
    path = tmp_path / "weights.safetensors"
    found = set()
    for byte in (b"a", b"b"):
        with open(path, "wb") as file:
            file.seek(2**26 + 5)
            file.write(byte)
        found.add(fingerprint(path))
    assert len(found) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5_000, "nested too deep"),
        ("graph: &a [*a]", "also says graph|contains itself"),
        ("probes: p\ngrid: {a: &a [*a]}", "contains itself"),
        ('probes: p\ngrid: {a: ["\\ud800"]}', "surrogate"),
        ("probes: scan\ngrid: {model: [/]}", "holds more than 10,000 files"),
        ("\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]), "1.23e\\+11 values"),
        ("- &a [x, x]\n- [" + ", ".join(["*a"] * 10) + "]", "must hold a mapping"),
        ("probes: p\ngrid: {" + ", ".join(f"a{n}: [" + ", ".join(map(str, range(1000))) + "]" for n in range(4)) + "}", "1,000,000,000,000 cells"),
    ],
)  # fmt: skip
def test_a_spec_that_would_take_the_machine_is_refused_at_once(tmp_path, text, message):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(CausalProbeError, match=message) as refused:
        plan(read_spec(tmp_path / "spec.yaml"), {**PROBES, "p": probe})
    assert len(str(refused.value)) < 400


def test_a_range_of_more_cells_than_there_can_be_is_refused():
    for n in (10**12, 10**30):
        with pytest.raises(CausalProbeError, match="cells, more than the 1,000,000"):
            plan({"probes": "p", "grid": {"a": range(n)}}, {"p": probe})


@pytest.mark.parametrize(
    "content",
    [
        "[" * 5000,
        "graph: &a [*a]",
        'graph: "\\ud800"',
        "\n".join(["a: &a0 [x, x]", *(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(10))]),
        "- 1",
        "model: [/",
    ],
)
def test_a_spec_that_is_no_plain_mapping_is_refused_in_a_line(content, tmp_path):
    (tmp_path / "spec.yaml").write_text(content)
    with pytest.raises(CausalProbeError) as caught:
        read_spec(tmp_path / "spec.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "at least 1"),
        ({"scheduler": "tcp://127.0.0.1:1"}, "say backend dask"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(CausalProbeError, match=message):
        sweep(SPEC, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- what is kept


def test_a_row_says_where_it_is_from_and_what_its_probe_found(done):
    table = done.to_pandas()
    assert list(table) == COLUMNS.names
    assert len(table) == 4 * 4  # four nodes after node 0, in each of four cells
    for cell in done.cells:
        rows = table[table["cell"] == cell.key]
        found = PROBES["gradient"](seed=cell.derived_seed, **cell.options)
        assert rows["score"].tolist() == [row["score"] for row in found.rows]
        assert rows["true"].tolist() == [row["true"] for row in found.rows]
        first = rows.iloc[0]
        assert (first["seed"], first["derived_seed"], first["threads"]) == (cell.seed, cell.derived_seed, 1)
        assert json.loads(first["options"]) == dict(cell.options)
        assert json.loads(first["versions"])["torch"] == torch.__version__
        assert (first["graph"], first["graph_seed"]) == ("forest", cell.options["graph_seed"])
    everything = pd.read_parquet(done.folder / "cells")  # without this package
    assert len(everything) == len(table)


def test_the_summary_has_a_row_for_each_cell(done):
    summary = done.summary()
    assert summary["status"].tolist() == ["finished"] * 4
    assert summary["rows"].tolist() == [4] * 4
    written = pd.read_csv(done.folder / "summary.csv")
    assert written["f1"].tolist() == summary["f1"].tolist()
    assert done.to_dict()["finished"] == 4
    assert "4 of 4 cells finished, 0 failed" in repr(done)
    assert "nichani2024" in done.cite().bibtex
    assert "<table" in done._repr_html_()


def test_every_shipped_probe_gives_rows_of_the_dataset(tmp_path):
    model = models.DisentangledTransformer(5, 8)
    models.save(model, tmp_path / "model")
    spec = {
        "probes": ["scan", "head_graphs"],
        "cells": [{"model": str(tmp_path / "model")}],
        "settings": {"n_sequences": 4, "period": 3},
    }
    found = sweep(spec, out=tmp_path / "out")
    assert not found.failed
    table = found.to_pandas()
    cell = found.cells[0]
    direct = probes.scan(model, n_sequences=4, period=3, seed=cell.derived_seed)
    rows = table[table["probe"] == "scan"]
    assert rows["score"].tolist() == pytest.approx(direct.to_pandas()["score"].tolist(), nan_ok=True, abs=0)
    graphs = table[table["probe"] == "head_graphs"]
    assert len(graphs) == 2 * 5  # two heads, five nodes after node 0
    assert graphs["model"].unique().tolist() == [str(tmp_path / "model")]


def test_recover_gives_a_row_for_each_candidate(tmp_path):
    short = {"n_positions": 5, "steps": 3, "batch_size": 32, "probe_sequences": 64}
    spec = {"probes": "recover", "grid": {"graph": ["chain"], "training": ["joint"]}, "settings": short}
    found = sweep(spec, out=tmp_path / "out")
    assert not found.failed
    direct = experiments.recover("chain", training="joint", seed=found.cells[0].derived_seed, device="cpu", **short)
    table = found.to_pandas()
    assert table["gain"].tolist() == list(direct.effects[0].to_pandas()["gain"])
    assert found.summary()["loss"].tolist() == [direct.loss]


def test_a_column_that_there_is_not_is_refused():
    with pytest.raises(CausalProbeError, match="columns colour, which"):
        encode(Cell("p", 0, {}, 1, {}), [{"colour": 1}], {}, {})


def test_a_cell_runs_with_its_number_of_threads(tmp_path):
    before = torch.get_num_threads()
    found = sweep({"probes": "p", "grid": {"a": [0]}, "threads": 3}, out=tmp_path / "out", probes={"p": probe})
    assert found.summary()["threads"].tolist() == [3]
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------------------------------------------- failures and restarts


def test_a_failed_cell_stops_no_other_and_is_tried_again(tmp_path):
    calls = []
    broken = {1}

    def sometimes(*, seed: int, a: int) -> Outcome:
        calls.append(a)
        if a in broken:
            raise ZeroDivisionError("so it is\nin two lines")
        return Outcome([{"score": float(a)}], {})

    spec = {"probes": "p", "grid": {"a": [0, 1, 2]}}
    found = sweep(spec, out=tmp_path / "out", probes={"p": sometimes})
    assert list(found.failed.values()) == ["ZeroDivisionError: so it is in two lines"]
    record = json.loads((tmp_path / "out" / "failed" / f"{found.cells[1].key}.json").read_text())
    assert "sometimes" in record["traceback"]
    assert record["cell"]["options"] == {"a": 1}
    assert found.to_pandas()["score"].tolist() == [0, 2]
    assert found.summary()["status"].tolist() == ["finished", "failed", "finished"]
    assert "ZeroDivisionError" in repr(found)

    broken.clear()
    before = stamps(tmp_path / "out")
    again = sweep(spec, out=tmp_path / "out", probes={"p": sometimes})
    assert calls == [0, 1, 2, 1]
    assert not again.failed
    assert not list((tmp_path / "out" / "failed").iterdir())
    assert before.items() <= stamps(tmp_path / "out").items()

    grown = {"probes": "p", "grid": {"a": [0, 1, 2, 3]}}
    assert len(sweep(grown, out=tmp_path / "out", probes={"p": sometimes}).to_pandas()) == 4
    assert calls[4:] == [3]
    with pytest.raises(CausalProbeError, match="holds 1 finished cells that this sweep does not ask for"):
        sweep(spec, out=tmp_path / "out", probes={"p": sometimes})


def test_the_order_of_the_cells_does_not_matter(tmp_path, done):
    turned = {**SPEC, "grid": {"seed": [1, 0], "graph_seed": [1, 0]}}
    assert contents(sweep(turned, out=tmp_path / "out").folder) == contents(done.folder)


@pytest.mark.slow
def test_workers_that_die_and_other_backends_change_nothing(tmp_path, done):
    marker = tmp_path / "marker"

    def deadly(*, seed: int, a: int, marker: str) -> Outcome:
        if a == 1 and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome([{"score": float(a)}], {})

    spec = {"probes": "deadly", "grid": {"a": [0, 1, 2]}, "settings": {"marker": str(marker)}}
    out = tmp_path / "deadly"
    assert not sweep(spec, out=out, jobs=2, probes={"deadly": deadly}).failed
    assert marker.exists()
    assert len(contents(out)) == 3

    loky = sweep(SPEC, out=tmp_path / "loky", jobs=2)
    dask = sweep(SPEC, out=tmp_path / "dask", jobs=2, backend="dask")
    assert contents(loky.folder) == contents(dask.folder) == contents(done.folder)
    pd.testing.assert_frame_equal(loky.to_pandas(), done.to_pandas())


@pytest.mark.slow
def test_kill_minus_nine_loses_nothing_and_repeats_nothing(tmp_path):
    spec = {**SPEC, "grid": {"graph_seed": list(range(6)), "seed": list(range(20))}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from causal_probe.cli import main; main()", "sweep", "spec.yaml", "--out", "out"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        while process.poll() is None and len(stamps(out)) < 5:
            time.sleep(0.01)
        process.kill()
        process.wait()
    left = stamps(out)
    assert 5 <= len(left) < 120, (tmp_path / "log").read_text()
    (out / "cells" / ".0123.parquet.causal-probe-partial").write_bytes(
        b"half a file"
    )  # what a kill within a write leaves
    whole = sweep(spec, out=out)
    after = stamps(out)
    assert left.items() <= after.items()
    assert len(after) == 120
    assert not list(out.rglob("*causal-probe-partial"))
    assert contents(out) == contents(sweep(spec, out=tmp_path / "other").folder)
    assert len(whole.to_pandas()) == 120 * 4


def test_a_second_writer_is_refused(tmp_path):
    sweep({"probes": "p", "grid": {"a": [0]}}, out=tmp_path, probes={"p": probe})
    with hold(tmp_path), pytest.raises(CausalProbeError) as refused:
        sweep({"probes": "p", "grid": {"a": [0]}}, out=tmp_path, probes={"p": probe})
    assert str(refused.value).startswith("Another process is writing into")
    assert "\n" not in str(refused.value)


def test_a_newer_format_is_refused(tmp_path):
    spec = {"probes": "p", "grid": {"a": [0]}}
    found = sweep(spec, out=tmp_path, probes={"p": probe})
    path = tmp_path / "cells" / f"{found.cells[0].key}.parquet"
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[METADATA])
    newer = {**about, "format": 2, "versions": {"causal-probe": "9.0"}}
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(newer)}), path)
    with pytest.raises(CausalProbeError, match=r"format 2, written by causal-probe 9\.0.*Upgrade"):
        found.to_pandas()
    write_json(tmp_path / "sweep.json", seal({"kind": "sweep", "format": 2}))
    with pytest.raises(CausalProbeError, match="Upgrade"):
        sweep(spec, out=tmp_path, probes={"p": probe})
    path.write_bytes(b"no Parquet")
    with pytest.raises(CausalProbeError, match="can't be read as Parquet"):
        Store(tmp_path).about(found.cells[0].key)


def test_a_flipped_bit_in_a_cell_is_found(tmp_path):
    """Wherever it is: in a page, in the footer's numbers, in what the file says about its cell, or in a column's name."""
    found = sweep({**SPEC, "grid": {"seed": [0]}}, out=tmp_path)
    path = tmp_path / "cells" / f"{found.cells[0].key}.parquet"
    whole, source = path.read_bytes(), np.random.default_rng(0)
    before = found.to_pandas()
    for at in source.choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(source.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            after, about = found.to_pandas(), found.summary()
        except CausalProbeError:
            continue
        pd.testing.assert_frame_equal(after, before)  # a bit that says nothing
        assert len(about) == 1


def test_a_saved_sweep_comes_back(done, tmp_path):
    done.save(tmp_path / "a.safetensors")
    again = Sweep.load(tmp_path / "a.safetensors")
    assert again.to_dict() == done.to_dict()
    assert again.cells == done.cells
    pd.testing.assert_frame_equal(again.to_pandas(), done.to_pandas())


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CausalProbeError, match="holds no sweep"):
        sweep(SPEC, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# ----------------------------------------------------------------------------------------------------------------- corpora


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A model with a tokenizer, and two corpora, saved."""
    folder = tmp_path_factory.mktemp("texts")
    tiny_huggingface.llama().save_pretrained(folder / "model")
    tiny_huggingface.tokenizer(bos=True).save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    for name in ("one.txt", "two.txt"):
        documents = [" ".join(f"t{token}" for token in draw.integers(3, 9, draw.integers(4, 30))) for _ in range(9)]
        (folder / name).write_text("\n--\n".join(documents))
    return folder


def test_shards_of_corpora_are_cells_and_merge_to_the_whole(texts, tmp_path):
    corpora = [str(texts / "one.txt"), str(texts / "two.txt")]
    templates = ["previous-token", "duplicate-token"]
    settings = {"model": str(texts / "model"), "length": 8, "separator": "--"}
    shards = ["0/2", "1/4", "3/4"]
    spec = {"probes": {"scan": {"templates": templates}}, "grid": {"corpus": corpora, "shard": shards}}
    found = sweep({**spec, "settings": settings}, out=tmp_path / "out")
    assert not found.failed, found
    assert found.to_pandas()["shard"].unique().tolist() == shards
    assert found.summary()["sequences"].notna().all()
    merged = found.merged()
    assert merged["shards"].tolist() == [3] * len(merged)
    written = pd.read_csv(found.folder / "merged.csv")
    assert written["score"].tolist() == pytest.approx(merged["score"].tolist(), abs=1e-12)
    model = hooks.to_hooked(*models.load_model(texts / "model"))
    for name in corpora:
        made = hooks.corpus(model, name, length=8, separator="--")
        whole = probes.scan(model, made, templates=templates)
        rows = merged[merged["corpus"] == name].set_index(["layer", "head", "template"])
        assert len(rows) == len(list(whole)) == 2 * 4 * 2
        for one in whole:
            row = rows.loc[one[:3]]
            assert (row["n_sequences"], row["measured_rows"]) == (one.n_sequences, one.rows)
            for value in ("score", "chance", "excess", "sink", "stderr", "excess_stderr"):
                assert row[value] == pytest.approx(getattr(one, value), abs=1e-6), value  # float32, other micro-batches
            assert row["found"] == (one[:3] in {called[:3] for called in whole.called()})

    one_less = {**spec, "grid": {"corpus": corpora, "shard": shards[:2]}, "settings": settings}
    with pytest.raises(CausalProbeError, match=r"one\.txt, the shards 3/4 failed or are not in the sweep"):
        sweep(one_less, out=tmp_path / "less").merged()
    assert not (tmp_path / "less" / "merged.csv").exists()


def test_head_graphs_of_corpora(texts, tmp_path):
    spec = {
        "probes": "head_graphs",
        "grid": {"corpus": [str(texts / "one.txt"), str(texts / "two.txt")]},
        "settings": {"model": str(texts / "model"), "length": 8, "separator": "--"},
    }
    found = sweep(spec, out=tmp_path / "out")
    assert not found.failed
    model = hooks.to_hooked(*models.load_model(texts / "model"))
    for name, rows in found.to_pandas().groupby("corpus"):
        direct = probes.head_graphs(model, hooks.corpus(model, name, length=8, separator="--"))
        wanted = [c.value for layer in range(2) for head in range(4) for c in direct.parents(layer, head)]
        assert rows["attention"].tolist() == pytest.approx(wanted, abs=1e-9)
        assert set(rows["n_sequences"]) == {direct.provenance["corpus"]["sequences"]}
    with pytest.raises(CausalProbeError, match="has no option shard"):
        sweep({**spec, "grid": {**spec["grid"], "shard": ["0/2"]}}, out=tmp_path / "shards")
    with pytest.raises(CausalProbeError, match="no scan of a corpus"):
        found.merged()


# ------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("name", "step"),
    [("runs/checkpoint-500/", 500), ("step143000", 143000), ("model_7", 7), ("12", 12), ("gpt2", 2), ("70m", None)],
)
def test_the_step_in_a_name(name, step):
    assert step_of(name) == step


def test_checkpoints_give_scores_against_training_step(tmp_path):
    steps = [0, 10, 20, 30, 40, 50]
    for step in steps:
        model = models.DisentangledTransformer(d_vocab=6, n_positions=12)
        with torch.no_grad():  # from step 30 on, a previous-token head
            model.block(0, 0, query="position", key="position").diagonal(-1).fill_(20.0 if step >= 30 else 0.01 * step)
        models.save(model, tmp_path / f"step{step}")
    names = [str(tmp_path / f"step{step}") for step in steps]
    spec = {
        "probes": "scan",
        "grid": {"model": names, "seed": [0, 1]},
        "settings": {"n_sequences": 8, "templates": ["previous-token"]},
    }
    found = sweep(spec, out=tmp_path / "out")
    assert not found.failed
    over_time = found.dynamics("previous-token")
    assert over_time.steps == tuple(steps)
    change = over_time.changes["L0H0"]
    assert change is not None
    assert change.step == 30
    assert change.after > 0.9
    assert over_time.changes["L1H0"] is None  # a head that never moves
    seeds = [cell.derived_seed for cell in found.cells[:2]]
    direct = [
        probes.scan(models.load(tmp_path / "step40"), templates="previous-token", n_sequences=8, seed=seed).of(
            0, 0, "previous-token"
        )
        for seed in seeds
    ]
    assert over_time.series["L0H0"][4] == pytest.approx(np.mean([one.excess for one in direct]), abs=1e-12)
    with pytest.raises(CausalProbeError, match="four checkpoints or more"):
        found.dynamics("induction")


def test_revisions_from_the_hub(tmp_path, monkeypatch):
    """Two revisions in a cache of the hub's layout, as a download leaves it, and no network."""
    import huggingface_hub.constants

    cache = tmp_path / "cache" / "models--somebody--tiny"
    (cache / "refs").mkdir(parents=True)
    made = {}
    for number, step in enumerate((1000, 2000, 3000, 4000)):
        revision, commit = f"step{step}", f"{number}" * 40
        (cache / "refs" / revision).write_text(commit)
        made[revision] = tiny_huggingface.llama(rope_theta=10.0 * (number + 1))  # so that each attends differently
        made[revision].save_pretrained(cache / "snapshots" / commit)
        tiny_huggingface.tokenizer(bos=True).save_pretrained(cache / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    spec = {
        "probes": "scan",
        "grid": {"revision": list(made)},
        "settings": {"model": "somebody/tiny", "templates": ["previous-token"], "n_sequences": 4, "period": 8},
    }
    found = sweep(spec, out="out")
    assert not found.failed, found
    table = found.to_pandas()
    assert table["step"].unique().tolist() == [1000, 2000, 3000, 4000]
    assert table["revision"].unique().tolist() == list(made)
    for cell, (revision, model) in zip(found.cells, made.items(), strict=True):
        hooked = hooks.to_hooked(model, tiny_huggingface.tokenizer(bos=True))
        direct = probes.scan(hooked, templates="previous-token", n_sequences=4, period=8, seed=cell.derived_seed)
        rows = table[table["revision"] == revision]
        assert rows["score"].tolist() == pytest.approx([one.score for one in direct], abs=1e-6)
    assert found.dynamics("previous-token").steps == (1000, 2000, 3000, 4000)
    nowhere = {**spec, "grid": {"revision": ["step9"]}}
    (error,) = sweep(nowhere, out="other").failed.values()
    assert "hub can't be reached" in error


def test_a_training_run_in_which_an_induction_head_forms(tmp_path):
    """The first layer learns to look one back; the second compares what that has copied, and so becomes an induction head with it."""
    task = tasks.InContextMarkov(graphs.chain(11), d_vocab=10, concentration=0.1)
    model = models.DisentangledTransformer(10, task.n_positions)
    training.give_matcher(model)
    folder = tmp_path / "run"

    def keep(step, its):
        models.save(its, folder / f"step{step}")

    stages = training.staged(n_positions=task.n_positions, graph_batch_size=2048, steps=40, batch_size=256)
    source = tasks.generator(0, "training")
    training.fit(model, task, stages, generator=source, probe=keep, probe_every=6)
    spec = {
        "probes": {"scan": {"templates": ["previous-token", "induction"]}},
        "grid": {"model": sorted(map(str, folder.iterdir())), "seed": [0, 1]},
        "settings": {"n_sequences": 16, "period": 5},
    }
    found = sweep(spec, out=tmp_path / "out")
    assert not found.failed, found
    previous, induction = (found.dynamics(template) for template in ("previous-token", "induction"))
    assert previous.series["L0H0"][0] == pytest.approx(0, abs=1e-6)
    assert previous.series["L0H0"][-1] > 0.5
    assert induction.series["L1H0"][-1] > induction.series["L1H0"][0] + 0.3
    looks_back, copies = previous.changes["L0H0"], induction.changes["L1H0"]
    assert looks_back is not None
    assert copies is not None
    assert looks_back.step <= copies.high
    assert abs(induction.series["L0H0"]).max() < 0.3  # the other head is no induction head at any time


def test_a_checkpoint_with_a_pickle_is_refused_with_the_reason(tmp_path):
    folder = tmp_path / "step1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    found = sweep({"probes": "scan", "grid": {"model": [str(folder)]}}, out=tmp_path / "out")
    (error,) = found.failed.values()
    assert "are pickles (pytorch_model.bin)" in error
    assert "can run any code" in error


def test_a_model_of_another_place_and_precision(tmp_path, monkeypatch):
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16, vocab_size=20
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    asked = {}
    load = transformers.AutoModelForCausalLM.from_pretrained

    def spy(*args, **options):
        asked.update(options)
        return load(*args, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    loaded = models.load_model(tmp_path / "llama", dtype="bfloat16", device_map={"": "cpu"})
    assert asked["device_map"] == {"": "cpu"}
    scored = probes.scan(hooks.to_hooked(*loaded), templates="previous-token", n_sequences=2, period=4, bos="no")
    assert scored.provenance["dtype"] == "bfloat16"
    with pytest.raises(CausalProbeError, match="is on this machine and has none"):
        models.load_model(tmp_path / "llama", revision="step1")
