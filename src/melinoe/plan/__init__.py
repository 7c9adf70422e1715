"""
Know before you run: will a model fit, how fast can it be, and what would bound it.

    hardware.py     cards, links, memories and disks by name (hardware.json, each with its source)
    measuring.py    this machine's own bandwidths
    facts.py        what a model weighs, from its config alone (models.json: four that ship)
    packed.py       what quantised weights weigh
    hit_rates.py    hit rates: assumed with a source (assumptions.json), or a trace's
    speed.py        seconds a token on each tier, and both ends of the speed
    planner.py      all of it: plan(model, ...) -> Plan
    limits.py       the table of what no engine can pass
    strategies.py   policies x slots x prefetches, for the bench
    runtimes.py     a model opened for each cache
    predicted.py    what the simulator says that they will count and take
    bench.py        all of them for real, predicted beside measured
"""
