"""Servers that `align` starts for a policy and stops again: vLLM, SGLang and `transformers serve`."""
