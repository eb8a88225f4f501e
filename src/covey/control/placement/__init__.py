"""Which node holds which layers of a model: `place` is the door; `memory` counts, `split` cuts, `refusal` explains."""
