"""A plan in words: tables of what fits and how fast, and each assumption beside them."""

from melinoe.cli import options
from melinoe.host_memory import format_bytes as size
from melinoe.host_memory import host_memory
from melinoe.plan.planner import Plan
from melinoe.plan.speed import Speed


def show(model: str, done: Plan) -> None:
    """The plan as tables and sentences."""
    facts = done.facts
    held = facts.dtype if facts.packed is None else f"{facts.dtype} where not packed"
    kv = "not known" if facts.kv_bytes is None else size(done.batch * facts.kv_bytes)
    rows = [
        ("config", "", facts.source),
        ("backbone", size(facts.backbone_bytes), f"{held}, every parameter but the experts"),
        ("keys and values", kv, f"{done.batch} x {facts.context} tokens; {facts.kv_source}"),
        ("kept free", size(done.reserve_bytes) if done.reserve_bytes else "0", ""),
        (
            "expert slots",
            size(done.slot_bytes),
            f"{done.slots} of {facts.num_experts} experts in each of {len(facts.layers)} layers; a "
            f"token uses {facts.top_k}",
        ),
        ("all experts", size(facts.expert_bytes), _where(done)),
    ]
    options.show_table(
        f"{model} ({facts.model_type}) in {size(done.gpu_memory_bytes)}",
        [{"what": what, "bytes": amount, "how": how} for what, amount, how in rows],
    )
    options.show_table(
        "Expected, not measured"
        + (f"; all {done.batch} sequences together" if done.batch > 1 else ""),
        [
            {
                "": name,
                "hit rate": _range(rates.low, rates.high, percent=True),
                "tokens/s": _range(found.low, found.high),
                "fast end bound by": found.bottleneck,
                "slow end mostly": found.slow_bottleneck,
            }
            for name, rates, found in (
                ("as it is", done.before, done.speed_before),
                ("fine-tuned for locality", done.after, done.speed_after),
            )
        ],
    )
    _show_tiers(done)
    for name, rates in (("as it is", done.before), ("fine-tuned", done.after)):
        print(f"Hit rate, {name}: {rates.source}.")
        if "belady" in rates.by_policy:
            figures = ", ".join(f"{key} {value:.1%}" for key, value in rates.by_policy.items())
            print(f"  by policy: {figures}; no policy passes belady.")
        if done.before == done.after:
            break
    for sentence in (*done.assumed, *done.notes):
        print(sentence)
    if (left := host_memory()) is not None:
        print(
            f"The host that plans has {size(left.free_bytes)} of memory left ({left.limited_by}); "
            "to plan with it, give that as --ram."
        )


def _show_tiers(done: Plan) -> None:
    """Milliseconds of one step on each tier alone."""
    parts = done.hardware

    def row(name: str, figure: object, key: str) -> dict[str, str]:
        def of(one: Speed) -> str:
            ends = (getattr(one.tiers_high, key), getattr(one.tiers_low, key))
            return _range(*(1e3 * end for end in ends))

        return {
            "tier": name,
            "bandwidth": str(figure),
            "ms a step, as it is": of(done.speed_before),
            "ms a step, fine-tuned": of(done.speed_after),
        }

    rows = [
        row("link", parts.link, "link"),
        row("device memory", parts.device, "device"),
    ]
    if done.fits_in_ram is False:
        rows.append(row("disk", parts.disk, "disk"))
    rows.append(row("host in the loop (slow end)", "-", "host"))
    rows.append(row("DRAM, were misses computed on the CPU", parts.dram, "dram_if_computed"))
    options.show_table("What each tier would take alone, fast end to slow end", rows)
    faster = done.speed_before.computed_high / done.speed_before.high
    if done.speed_before.bottleneck == "link" and abs(faster - 1) > 0.05:
        print(
            f"Computing misses on the CPU instead of loading them would make the fast end "
            f"{faster:.2g} times as fast as it is, as far as DRAM bounds it."
        )


def _where(done: Plan) -> str:
    if done.all_resident:
        return "all of them in slots"
    kept = "" if done.bits is None else f"stored at {done.bits} bits; "
    if done.fits_in_ram is None:
        return kept + "wait in host memory, if it is large enough (--ram)"
    if done.fits_in_ram:
        return kept + "fit in host memory"
    return kept + "do not fit in host memory: misses go to the disk"


def _range(low: float, high: float, percent: bool = False) -> str:
    ends = [f"{one:.1%}" if percent else _three(one) for one in (low, high)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
