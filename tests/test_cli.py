"""The command line: what it prints, its exit codes, and that `check` can fail."""

import json
import subprocess
import sys

import pytest
import torch

import pyops
from pyops import cli
from pyops.bench import agreement, shapes
from pyops.commands import check, demo
from pyops.data import Dataset, load_digits
from pyops.training import cnn

pytestmark = pytest.mark.usefixtures("without_interpreter")


def run(*arguments, timeout=100):
    """`python -m pyops` in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "pyops", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_module_prints_version_and_help():
    shown = run("--help")
    assert shown.returncode == 0 and not shown.stderr
    for command in ("info", "check", "bench", "train", "demo"):
        assert command in shown.stdout


@pytest.mark.parametrize("command", ("info", "check", "bench", "train", "demo"))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "exit codes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["nothing"], "nothing"),
        (["train", "lstm9"], "lstm9"),
        (["train", "cnn", "--epochs", "0"], "--epochs"),
        (["train", "cnn", "--learning-rate", "nan"], "--learning-rate"),
        (["check", "--device", "abacus"], "abacus"),
        (["check", "--device", "cuda:99"], "cuda:99"),
        (["bench", "conv_relu_pool", "--dtype", "int8"], "int8"),
        (["bench", "conv_relu_pool", "--budget", "-1"], "--budget"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_argument(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "conv_relu_pool", "--shapes", "12x"], "'12x'"),
        (["bench", "conv_relu_pool", "--shapes", "1x3x8->4:q7"], "'q7'"),
        (["bench", "conv_relu_pool", "--shapes", "1x3x2->4:k5"], "too small"),
        (["bench", "conv_relu_pool", "--shapes", "1x3x8->4:g2"], "groups"),
        (["bench", "conv_relu_pool", "--backend", "abacus"], "abacus"),
        (["train", "cnn", "--preset", "big"], "--preset"),
        (["train", "cnn", "--resume", "/nowhere/x.pt"], "/nowhere/x.pt"),
        (["train", "cnn", "--checkpoint", "/nowhere/x.pt"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_on_stderr(arguments, named, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pyops {arguments[0]}: error: ") and error.count("\n") == 1
    assert named in error


def test_info_json_tells_what_automatic_choice_takes():
    shown = run("info", "--json")
    assert shown.returncode == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["conv_relu_pool2d"]["reference"] is None
    chosen = {(r["op"], r["device"], r["dtype"]): r for r in facts["automatic"]}
    row = chosen["conv_relu_pool2d", "cpu", "float32"]
    assert row["backend"] in pyops.backends.NAMES and row["why"]
    if facts["build"] is not None:
        assert facts["cpu"]["features"][facts["cpu"]["active_isa"]] is True


def test_info_says_why_a_backend_is_missing(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name, reason in pyops.backends.available("conv_relu_pool2d").items():
        assert name in text and (reason or "available") in text


def test_check_passes(capsys, monkeypatch):
    monkeypatch.setattr(check, "GRID", check.GRID[:3])
    monkeypatch.setattr(check, "QUICK_MODELS", ("cnn mnist",))
    code = cli.main(["check", "--quick"])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "model cnn mnist" in text and "bfloat16" in text and "channels_last" in text


def shifted_everywhere(out):
    return out + 1e-3


def wrong_in_one_element(out):
    changed = out.clone()
    changed.view(-1)[-1] += 0.25
    return changed


def half_the_gradient(out):
    return out.detach() / 2 + out / 2


@pytest.mark.parametrize("plant", (shifted_everywhere, wrong_in_one_element, half_the_gradient))
def test_check_catches_a_wrong_kernel(plant, capsys, monkeypatch):
    right = pyops.conv_relu_pool2d
    monkeypatch.setattr(
        pyops, "conv_relu_pool2d", lambda *args, **kwargs: plant(right(*args, **kwargs))
    )
    monkeypatch.setattr(check, "GRID", check.GRID[:1])
    assert cli.main(["check", "--only", "ops"]) == 1
    assert "FAILED: conv_relu_pool2d, 2x3x20->16:p1, float32, nchw" in capsys.readouterr().out


def test_check_catches_a_kernel_that_raises(capsys, monkeypatch):
    def raising(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(pyops, "conv_relu_pool2d", raising)
    monkeypatch.setattr(check, "GRID", check.GRID[:1])
    assert cli.main(["check", "--only", "ops", "--verbose"]) == 1
    assert "RuntimeError: planted" in capsys.readouterr().out


def test_check_catches_a_wrong_swap(capsys, monkeypatch):
    optimize = pyops.optimize

    def wrong(model):
        report = optimize(model)
        model.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-5))
        return report

    monkeypatch.setattr(pyops, "optimize", wrong)
    monkeypatch.setattr(check, "QUICK_MODELS", ("cnn mnist",))
    assert cli.main(["check", "--only", "models", "--quick"]) == 1
    assert "FAILED: model cnn mnist" in capsys.readouterr().out


@pytest.mark.parametrize("notation", [n for names in shapes.SETS.values() for n in names])
def test_shape_notation_round_trips(notation):
    shape = shapes.parse(notation)
    assert str(shape) == notation
    assert shapes.parse(str(shape)) == shape


@pytest.mark.parametrize("notation", [n for n, _ in check.GRID])
def test_shape_sizes_are_those_of_torch(notation):
    shape = shapes.parse(notation)
    inputs = agreement.make_inputs(shape, torch.float32, torch.device("cpu"))
    out = agreement.chain(shape)(*inputs)
    assert out.shape == (shape.batch, shape.out_channels, *shape.out_size)
    assert out.numel() == shape.elements["output"]
    decided = agreement.decided_windows(shape, *(t.double() for t in inputs), dtype=torch.float32)
    assert decided.shape == out.shape and decided.float().mean() > 0.9


def test_undecided_windows_are_those_whose_winner_rounding_changes():
    shape = shapes.parse("1x1x4->1:k1")
    x = torch.tensor(
        [
            [1.0, 1.0, 3.0, 1.0],
            [0.0, -1.0, 2.0, 0.0],
            [-1.0, -2.0, 1e-9, -1.0],
            [-3.0, -4.0, -2.0, -3.0],
        ]
    ).double()
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1).double()
    decided = agreement.decided_windows(shape, x[None, None], one, zero, torch.float32)
    # a tie; a clear winner; a clear loser to ReLU; a winner at ReLU's edge
    assert decided.flatten().tolist() == [False, True, True, False]


@pytest.fixture
def few_digits(monkeypatch):
    """Real digits, but few of them: five steps an epoch."""
    data = load_digits()
    few = Dataset(*(t[:160] for t in vars(data).values()))
    monkeypatch.setattr(cnn, "dataset", lambda settings: few)


def test_demo_writes_plot_and_summary(few_digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ACCURACY_GOAL", 0.01)  # two epochs are about speed, not about skill
    code = cli.main(
        ["demo", "--epochs", "2", "--families", "--models", "--out", str(tmp_path / "out")]
    )
    text = capsys.readouterr().out
    assert code == 0, text
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert all(summary["checks"].values())
    for ops in ("reference", "fast"):
        assert len(summary["training"][ops]["losses"]) == 2 * 5
    saved = [summary["training"][o]["saved_for_backward_bytes"] for o in ("fast", "reference")]
    assert 0 < saved[0] < saved[1]
    assert any(name.startswith("gradient") for name in summary["agreement"])


def test_demo_trains_every_family(monkeypatch):
    """One epoch each, of the smallest kind: the losses agree, the figures are judged."""
    from pyops.commands import demo_families
    from pyops.training import gan, lstm, transformer

    monkeypatch.setattr(transformer, "STEPS_PER_EPOCH", 6)
    monkeypatch.setattr(gan.Trainer, "evaluate", lambda self: {"sample accuracy": 0.2})
    few = load_digits()
    few = Dataset(*(t[:160] for t in vars(few).values()))
    monkeypatch.setattr(gan, "load_digits", lambda size: few)
    monkeypatch.setattr(lstm, "load_digits", lambda size: few)
    rows = [demo_families.train(name, seed=0, epochs=1) for name in demo_families.FAMILIES]
    found = demo_families.checks(rows)
    agreed = [passed for name, passed in found.items() if "losses" in name]
    assert agreed == [True] * 3, rows
    goals = [passed for name, passed in found.items() if "losses" not in name]
    assert goals == [False] * 6  # nothing is learned in so few steps, and that shows
    assert "transformer lm" in demo_families.render(rows)


def test_demo_fails_below_the_accuracy_goal(few_digits, tmp_path, capsys):
    assert (
        cli.main(["demo", "--epochs", "1", "--families", "--models", "--out", str(tmp_path)]) == 1
    )
    assert "FAILED: accuracy" in capsys.readouterr().out


def test_demo_refuses_an_output_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("mine")
    assert cli.main(["demo", "--out", str(path)]) == 2
    assert path.read_text() == "mine"
    assert "not a folder" in capsys.readouterr().err
