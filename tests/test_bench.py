"""Benchmarks: what a row holds, results files, timing, and memory saved for backward."""

import json
import time

import pytest
import torch
import torch.nn.functional as F

import pyops
from pyops import cli
from pyops.bench import conv_relu_pool, harness, models, report, shapes

pytestmark = pytest.mark.usefixtures("without_interpreter")

CPU = torch.device("cpu")
NUMBERS = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "gflops",
    "gbytes_per_s",
    "percent_of_floor",
    "floor_ms",
)


def bench(*arguments):
    return cli.main(["bench", "conv_relu_pool", "--seconds", "0.05", *map(str, arguments)])


def test_rows_hold_everything(tmp_path, capsys):
    code = bench(
        *(
            "--shapes",
            "2x3x12->8:p1",
            "--backward",
            "both",
            "--baselines",
            "eager",
            "--out",
            tmp_path,
        )
    )
    text = capsys.readouterr().out
    assert code == 0, text
    content = json.loads((tmp_path / "conv_relu_pool.json").read_text())
    assert content["schema"] == report.SCHEMA
    assert [row["direction"] for row in content["rows"]] == ["forward", "forward+backward"]
    for row in content["rows"]:
        assert row["op"] == "conv_relu_pool2d" and row["shape"] == "2x3x12->8:p1"
        assert row["passed"] is True and row["torch"] == torch.__version__
        assert all(row[name] > 0 for name in NUMBERS)
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert set(row["baselines_ms"]) == {"eager nchw", "eager channels_last"}
        best = min(row["baselines_ms"].values())
        assert row["speedup"] == pytest.approx(best / row["median_ms"])
        assert 0 < row["saved_bytes"] < row["saved_bytes_eager"]
        assert "output" in row["error_ratio"]
    assert {"grad_input", "grad_weight", "grad_bias"} < set(content["rows"][1]["error_ratio"])
    assert "geo. mean" in text


def test_compiled_baseline_is_measured():
    options = conv_relu_pool.Options(CPU, baselines=("compile",), seconds_per_row=0.05)
    (row,) = conv_relu_pool.rows([shapes.parse("1x2x8->4:p1")], options)
    measured = set(row["baselines_ms"]) | set(row["baseline_errors"])
    assert measured == {"compile nchw", "compile channels_last"}
    assert row["baselines_ms"] or row["speedup"] is None


def test_no_speedup_beside_a_failed_check(tmp_path, capsys, monkeypatch):
    right = pyops.conv_relu_pool2d
    monkeypatch.setattr(pyops, "conv_relu_pool2d", lambda *a, **k: right(*a, **k) * 1.001)
    assert bench("--shapes", "1x2x8->4:p1", "--baselines", "eager", "--out", tmp_path) == 1
    (row,) = report.read_rows(tmp_path / "conv_relu_pool.json")
    assert row["passed"] is False and row["speedup"] is None
    assert "CHECK FAILED" in capsys.readouterr().out


def test_backend_that_refuses_gives_a_row_with_the_reason(monkeypatch):
    reason = "backend: triton cannot take this call: planted"

    def refusing(*args, backend=None, **kwargs):
        raise RuntimeError(reason)

    monkeypatch.setattr(pyops, "conv_relu_pool2d", refusing)
    options = conv_relu_pool.Options(
        CPU, backends=("triton",), baselines=("eager",), seconds_per_row=0.05
    )
    (row,) = conv_relu_pool.rows([shapes.parse("1x2x8->4:p1")], options)
    assert row["passed"] is None and reason in row["reason"] and row["speedup"] is None
    assert row["baselines_ms"]


def test_op_that_raises_is_a_failed_row_and_the_others_are_measured(tmp_path, capsys, monkeypatch):
    right = pyops.conv_relu_pool2d

    def raising(x, *args, **kwargs):
        if x.shape[1] == 3:
            raise RuntimeError("planted")
        return right(x, *args, **kwargs)

    monkeypatch.setattr(pyops, "conv_relu_pool2d", raising)
    selected = ("--shapes", "1x3x8->4:p1", "1x2x8->4:p1")
    assert bench(*selected, "--baselines", "eager", "--out", tmp_path) == 1
    rows = report.read_rows(tmp_path / "conv_relu_pool.json")
    assert [row["passed"] for row in rows] == [False, True]
    assert "planted" in rows[0]["reason"] and "FAILED" in capsys.readouterr().out


def test_budget_stops_before_the_next_shape():
    options = conv_relu_pool.Options(CPU, baselines=("eager",), seconds_per_row=0.01, budget=1e-9)
    assert list(conv_relu_pool.rows([shapes.parse("1x2x8->4:p1")], options)) == []


def test_rows_of_another_run_are_kept_and_equal_ones_replaced(tmp_path):
    path = tmp_path / "deep" / "results.json"
    row = {key: "x" for key in report.KEY}
    report.ResultsFile(path).add({**row, "median_ms": 1})
    report.ResultsFile(path).add({**row, "shape": "y", "median_ms": 2})
    report.ResultsFile(path).add({**row, "median_ms": 3})
    assert [r["median_ms"] for r in report.read_rows(path)] == [2, 3]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ("", "[1, 2]", '{"schema": 99, "rows": []}', '{"rows"'))
def test_file_that_is_no_results_file_is_left_alone(tmp_path, content, capsys):
    path = tmp_path / "conv_relu_pool.json"
    path.write_text(content)
    assert bench("--shapes", "1x2x8->4:p1", "--out", tmp_path) == 2
    assert "results" in capsys.readouterr().err
    assert path.read_text() == content


def test_interrupted_write_leaves_the_old_rows(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    report.ResultsFile(path).add({"op": "a"})
    results = report.ResultsFile(path)
    with pytest.raises(ValueError, match="JSON compliant"):
        results.add({"op": "b", "median_ms": float("nan")})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.write_atomically(path, "half")
    assert report.read_rows(path) == [{"op": "a"}]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_timing_tells_candidates_apart():
    timings = harness.time_interleaved(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}, CPU, 0.1
    )
    assert timings["short"].samples >= harness.MIN_ROUNDS
    assert 0.001 <= timings["short"].median < timings["long"].median


def test_saved_bytes_count_each_storage_once():
    x = torch.randn(4, 100, requires_grad=True)
    weight = torch.randn(100, 100, requires_grad=True)
    _, saved = harness.saved_for_backward(lambda: F.relu(x @ weight), exclude=(weight,))
    assert saved == 2 * 4 * 100 * 4  # the product's input and ReLU's output
    _, saved = harness.saved_for_backward(lambda: (x * x).sum())
    assert saved == 4 * 100 * 4


def test_saved_bytes_of_fused_and_plain():
    shape = shapes.parse("1x8x16->8:p1")
    inputs = conv_relu_pool.agreement.make_inputs(shape, torch.float32, CPU)
    eager = conv_relu_pool._saved_bytes(conv_relu_pool.agreement.chain(shape), inputs, "nchw")
    image, conv, pooled = 8 * 256 * 4, 8 * 256 * 4, 8 * 64
    assert eager == image + conv + pooled * 8  # input, ReLU's output, int64 indices


def test_flops_of_dropped_pixels_do_not_count():
    # 13 x 13 convolution outputs, of which pooling reads 12 x 12
    assert shapes.parse("1x2x13->4:p1").conv_flops == 2 * 4 * 12 * 12 * 9 * 2
    assert shapes.parse("1x2x13->4:p1,nopool").conv_flops == 2 * 4 * 13 * 13 * 9 * 2
    assert shapes.parse("1x2x16->4:p1").gradient_density == 0.25


def test_model_rows(monkeypatch):
    case = models.MODELS["cnn mnist"]
    monkeypatch.setattr(models, "MODELS", {"cnn mnist": case})
    rows = models.measure_inference("cnn mnist", 2, CPU, compiled=False, seconds=0.1)
    assert [row["layout"] for row in rows] == ["nchw", "channels_last"]
    for row in rows:
        assert row["passed"] and row["speedup"] > 0 and row["replaced"] == 3
        assert set(row["baselines_ms"]) == {"eager nchw", "eager channels_last"}
    json.dumps(rows, allow_nan=False)


def test_table_sets_numbers_to_the_right():
    text = report.table(["name", "ms"], [["a", "1.5"], ["longer", "12"]])
    assert text.splitlines() == ["name     ms", "------  ---", "a       1.5", "longer   12"]
