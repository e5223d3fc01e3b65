"""Bugs planted into the Hopper convolutions: the emulator or the numbers must tell of each.

All are compiled into one library and switched on one at a time, since compiling the kernels takes
longer than running them.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from conv_pool_wgmma_run import Case, Emulated, sources

import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

DEEP, FIRST = "conv_relu_pool_wgmma.cu", "conv_relu_pool_wgmma_stem.cu"
NUMBERS, FLIGHT = "error|NaN or inf|codes differ", "in flight"
RACE = "race|more arrivals"
OUTSIDE = "global access|race"


def _infinite(x):
    x[:, :, 5, 5] = float("inf")


RESIDENT = Case((9, 64, 9, 8), 64, whole=True, multiprocessors=1)
RING = Case((5, 128, 9, 8), 128, whole=True, multiprocessors=1)
THREE = Case((6, 3, 8, 12), 40, whole=True, multiprocessors=1)
ONE = Case((1, 1, 12, 12), 32, edit=_infinite)


@dataclass(frozen=True)
class Bug:
    file: str
    case: Case
    right: str  # a statement (with its semicolon) or an expression
    wrong: str
    report: str
    near: str = ""  # text around `right`, where that alone is not unique

    def __str__(self) -> str:
        return f"{self.right} to {self.wrong or 'nothing'}"


BUGS = [
    # halos
    Bug(DEEP, RESIDENT, "mbar_wait(empty + 8 * at.slot, at.phase ^ 1);", "", RACE),
    Bug(DEEP, RESIDENT, "mbar_wait(empty + 8 * at.slot, at.phase ^ 1);",
        "mbar_wait(empty + 8 * at.slot, at.phase);", "deadlock"),
    Bug(DEEP, RESIDENT, "mbar_wait(full + 8 * at.slot, at.phase);", "", RACE),
    Bug(DEEP, RESIDENT, "mbar_arrive_expect_tx(bar, Tile::kBytes);",
        "mbar_arrive_expect_tx(bar, Tile::kBytes - 128);", "bytes|" + RACE),
    Bug(DEEP, RESIDENT, "mbar_arrive_expect_tx(bar, Tile::kBytes);",
        "mbar_arrive_expect_tx(bar, Tile::kBytes + 128);", "deadlock"),
    Bug(DEEP, RESIDENT, "mbar_init(empty + 8 * i, 4);", "mbar_init(empty + 8 * i, 5);", "deadlock"),
    Bug(DEEP, RESIDENT, "mbar_init(empty + 8 * i, 4);", "mbar_init(empty + 8 * i, 1);", RACE),
    Bug(DEEP, RESIDENT, "tile.y * kRows - p.pad_h", "tile.y * kRows - p.pad_h + 1", NUMBERS),
    Bug(DEEP, RESIDENT, "slot -= kSlots;", "slot = 1;", f"{RACE}|deadlock|{NUMBERS}"),
    Bug(DEEP, RING, "phase ^= 1;", "", RACE + "|deadlock", "phase ^= 1;\n    }\n  }\n};"),
    Bug(DEEP, RING, "if (tap == 0 && block > 0) mbar_arrive(empty + 8 * slot_before);", "",
        "deadlock"),
    # weights
    Bug(DEEP, RESIDENT, "mbar_wait(weight_full + 8 * tap, weight_phase);", "", RACE),
    Bug(DEEP, RING, "mbar_wait(weight_full + 8 * tap, weight_phase);",
        "if (block == 0) mbar_wait(weight_full + 8 * tap, weight_phase);", RACE),
    Bug(DEEP, RING, "mbar_wait(empty + 8 * tap, phase ^ 1);", "", RACE),
    Bug(DEEP, RING, "mbar_init(weight_empty + 8 * i, 4 * kGroups);",
        "mbar_init(weight_empty + 8 * i, 4);", RACE),
    Bug(DEEP, RING, "tap > 0 ? tap - 1 : kTaps - 1", "tap", RACE + "|deadlock"),
    Bug(DEEP, RING, "if (!p.resident) weight_phase ^= 1;", "", RACE + "|deadlock"),
    Bug(DEEP, RING, "mbar_arrive_expect_tx(full + 8 * tap, kWeightBytes);",
        "mbar_arrive_expect_tx(full + 8 * tap, kWeightBytes / 2);", "bytes|" + RACE),
    # beginning
    Bug(DEEP, RESIDENT, "fence_mbarrier_init();", "", "no fence_mbarrier_init"),
    Bug(DEEP, RESIDENT, "sync_threads();", "", "nothing orders the init|holds no initialised"),
    # products
    Bug(DEEP, RESIDENT, "wgmma_fence();", "", "wgmma_fence",
        "if (steps == kChannels / 16) {\n            wgmma_fence();"),
    Bug(DEEP, RESIDENT, "wgmma_wait<0>();", "", RACE + "|" + FLIGHT),
    Bug(DEEP, RING, "wgmma_wait<1>();", "wgmma_wait<2>();", RACE),
    Bug(DEEP, RESIDENT, "wgmma_commit();", "", RACE + "|" + FLIGHT,
        "wgmma_commit();\n          } else {  // a last"),
    Bug(DEEP, RING, "false", "true", NUMBERS, "bool accumulate = false;"),
    Bug(DEEP, RESIDENT, "kPitch * 128", "1024", NUMBERS, "s) * 128, 1, kPitch * 128);"),
    Bug(DEEP, RING, "output_block * (kChannels / 16)", "output_block", NUMBERS),
    Bug(DEEP, RING, "16 * channel", "8 * channel", NUMBERS, "channel, 16 * channel, tap}"),
    Bug(DEEP, RING, "2 * channel", "channel", NUMBERS, "{2 * channel, channel,"),
    # stores
    Bug(DEEP, RESIDENT, "if (tile.image == p.batch) continue;", "", OUTSIDE),
    Bug(DEEP, RESIDENT, "if (tile.y * (kRows / 2) + i >= p.out_h) break;", "",
        OUTSIDE + "|" + NUMBERS),
    Bug(DEEP, RESIDENT, "static_cast<uint16_t>(low | high << 8)",
        "static_cast<uint16_t>(high | low << 8)", NUMBERS),
    # first layers
    Bug(FIRST, THREE, "fence_proxy_async_shared();", "", "no proxy fence"),
    Bug(FIRST, THREE, "sync_threads();", "", RACE + "|no proxy fence",
        "sync_threads();\n    const int x"),
    Bug(FIRST, THREE, "sync_threads();", "", RACE, "sync_threads();  // before"),
    Bug(FIRST, THREE, "wgmma_fence();", "", "wgmma_fence"),
    Bug(FIRST, THREE, "wgmma_wait<0>();", "", FLIGHT),
    Bug(FIRST, THREE, "min(max(x, 0), p.in_w - 1)", "x", OUTSIDE),
    Bug(FIRST, THREE, "min(max(y, 0), p.in_h - 1)", "y", OUTSIDE),
    Bug(FIRST, THREE, "value & some & inside[j]", "value & inside[j]", NUMBERS),
    Bug(FIRST, THREE, "if (channel >= p.out_channels) continue;", "", OUTSIDE + "|" + NUMBERS),
    Bug(FIRST, THREE, "t < 3 ? 6 : 1", "6", NUMBERS),
    Bug(FIRST, ONE, "if (step == kSteps - 1) a[dy][step][i % 4] &= mask[half];", "", NUMBERS),
]  # fmt: skip


def _plant(text: str, file: str) -> str:
    """The source with all of the file's bugs, each behind a switch."""
    places = dict.fromkeys((bug.right, bug.near) for bug in BUGS if bug.file == file)
    for right, near in places:
        near = near or right
        assert text.count(near) == 1 and near.count(right) == 1, f"the place has changed: {near}"
        wrongs = [(i, bug.wrong) for i, bug in enumerate(BUGS, 1)
                  if (bug.file, bug.right, bug.near or right) == (file, right, near)]  # fmt: skip
        if right.endswith(";"):
            switch = "".join(f"if (planted({i})) {{ {wrong} }} else " for i, wrong in wrongs)
            switch = f"{{ {switch}{{ {right} }} }}"
        else:
            switch = right
            for i, wrong in wrongs:
                switch = f"(planted({i}) ? ({wrong}) : ({switch}))"
        text = text.replace(near, near.replace(right, switch))
    return text


# Not instrumented, since nothing else of the test's own memory may be touched by a kernel.
_SWITCH = """
static int64_t planted_bug = 0;
__attribute__((no_sanitize("thread"), noinline)) static bool planted(int64_t bug) {
  return bug == planted_bug;
}
extern "C" const char* plant_%s(int64_t bug) {
  planted_bug = bug;
  return nullptr;
}
"""


@functools.cache
def _mutants(folder: Path) -> Emulated:
    for source in sources()[1:]:
        text = source.read_text()
        if source.name in (DEEP, FIRST):
            text = _plant(text, source.name)
            start = text.index("namespace pyops")
            text = text[:start] + _SWITCH % source.stem + text[start:]
        # One addressing, one type and two tile heights are enough here, and quick to compile.
        text = re.sub(r"Addressing::k(Copies|Pitch16|Planes)>\(f", "Addressing::kShifted>(f", text)
        text = re.sub(r"if \(plan.rows == (32|16)\) .*", "", text)
        text = text.replace("run_addressing<__half>", "run_addressing<__nv_bfloat16>")
        text = text.replace("run_taps<__half>", "run_taps<__nv_bfloat16>")
        (folder / source.name).write_text(text)
    return Emulated([sources()[0], *sources(folder)[1:]], "race")


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    return _mutants(tmp_path_factory.mktemp("planted"))


def _switch(mutants: Emulated, number: int) -> None:
    for file in (DEEP, FIRST):
        mutants.call(f"plant_{Path(file).stem}", number)


@pytest.mark.parametrize("case", [RESIDENT, RING, THREE, ONE])
def test_clean_without_them(mutants, case):
    _switch(mutants, 0)
    case.check(mutants, "chosen" if case in (THREE, ONE) else "shifted")


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1), ids=lambda i: str(BUGS[i - 1]))
def test_planted_bug_is_reported(mutants, number):
    bug = BUGS[number - 1]
    _switch(mutants, number)
    for seed in range(2):
        with pytest.raises(AssertionError) as caught:
            bug.case.check(mutants, "chosen" if bug.file == FIRST else "shifted", seed=seed)
        assert re.search(bug.report, str(caught.value)), caught.value
