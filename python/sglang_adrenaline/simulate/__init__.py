"""Discrete-event simulation of fleets: stock PD, aggregated instances and offloading, with the package's own policy.

    trace.py     requests: Mooncake traces, made-up ones
    steps.py     closed forms for runs of decode steps between two changes of a batch
    batch.py     a running batch that is advanced from change to change
    prefill.py   a prefill instance: queue, prefix cache, pins, executor
    decode.py    a decode instance of stock PD or with offloading; asks the policy
    aggregated.py  an instance that does both
    fleet.py     routing and the event loop
    report.py    figures, table, plots

Nothing here imports SGLang or torch.
"""
