"""What a recipe takes, before it is given GPUs: memory of every rank, time of a step, better layouts.

``command.py`` has the command. Each part knows those before it only:

    hardware, lengths                 what is assumed
    fake_world, trace, rank_plan      a rank's part of the trainer, built and run without values: bytes and operations
    servers, sync_cost                the servers' memory; the way of the weights
    generation, step_time             seconds of each phase
    plan                              all of it for one recipe; what is too large
    remedies, search                  other settings and layouts, planned in the same way
    tables                            for people, and as JSON
"""
