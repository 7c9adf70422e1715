"""The goals of the GPU benchmark are judged by the rows, as worked by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[3] / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def goals():
    sys.path.insert(0, str(GPU))
    try:
        spec = importlib.util.spec_from_file_location("gpu_goals", GPU / "goals.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(GPU))
        sys.modules.pop("plan", None)


def row(engine="fast", rate=0.1, step_s=2e-3, share=0.9, **more):
    return {"section": "decode", "model": "OLMoE-1B-7B", "layers": 16, "experts": "bf16",
            "batch": 1, "engine": engine, "miss_rate": rate, "step_s": step_s,
            "tokens_per_s": 1 / step_s, "share_of_roof": share} | more  # fmt: skip


def judged(goals, rows):
    return {one["goal"]: (one["measured"], one["met"]) for one in goals.judge(rows)}


def test_each_goal_is_judged_by_its_worst_row(goals):
    """Six engines' rows; every number is one of the division beside it."""
    found = judged(goals, [
        row(rate=0.05, share=0.1),  # below .1: not asked for
        row(rate=0.1, share=0.7, step_s=4e-3),
        row(rate=0.5, share=0.95, step_s=10e-3),
        row(rate=15 / 32, share=0.9, experts="int4", step_s=4e-3),
        row("fast, all resident", rate=0.0, step_s=1e-3),
        row("reference", rate=0.1, step_s=6e-3),
        row("reference", rate=0.5, step_s=30e-3),
        row("accelerate, experts on the CPU", rate=None, step_s=40e-3, share=None),
        {"section": "split", "layers": 16, "decide_s": 64e-6},
        {"section": "split", "layers": 16, "decide_s": 96e-6},
    ])  # fmt: skip
    assert found == {
        "share of the roof at miss rates of .1 and above": (0.7, False),
        "tok/s, OLMoE, all resident": (1000.0, True),
        "tok/s, OLMoE, 60 experts a token, 4 bits": (250.0, True),
        "times accelerate's offload, at the worst miss rate": (4.0, True),  # 40 / 10
        "times the reference engine, at the worst miss rate": (1.5, False),  # 6 / 4, not 30 / 10
        "us a layer to decide": (pytest.approx(6.0), False),  # 96 / 16
    }


def test_without_roofs_no_share_is_met(goals):
    """They could not be measured, so nothing is known of shares."""
    found = judged(goals, [row(share=None)])
    assert found["share of the roof at miss rates of .1 and above"] == (None, None)
    assert all(met is None for measured, met in found.values() if measured is None)
