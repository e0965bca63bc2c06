"""The code that `model.generate(..., custom_generate=<this repository>, trust_remote_code=True)` runs."""

import hf_turboquant


def generate(model, **arguments):
    """
    Runs `model.generate(**arguments)` over a `TurboQuantCache`, whose options may be among the arguments: see
    `hf_turboquant.generate`.
    """
    return model.generate(custom_generate=hf_turboquant.generate, **arguments)
