"""What `hf-turboquant evaluate` and `benchmark` measure. Nothing here is imported by `import hf_turboquant`."""
