"""Which node holds which layers: `place` is the door; `memory` counts, `nodes` ranks, `split` cuts, `refusal`
explains.
"""
