"""
Measures what a compressed cache does to a model: `hf-turboquant evaluate`.

    quality     perplexity, KL divergence and top-1 agreement of predictions made through the cache
    needle      whether the model finds a fact hidden in a long text
    fidelity    scores and outputs of attention, layer by layer
    claims      distortion, bias and variance of the method, on random vectors

Nothing here is imported by `import hf_turboquant`.
"""
