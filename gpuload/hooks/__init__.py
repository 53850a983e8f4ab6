"""Ways into unmodified programs. Each is thin: it finds the moment, and calls the client. Off unless asked for.

auto               what `gpuload run` and the .pth start: waits for what is patched to be imported
safetensors_patch  safe_open and its slices served from the resident server
prefetched         its `prefetch` of 0.9: a loader that hands each tensor out once
streamers          Run:ai's SafetensorsStreamer and InstantTensor's safe_open, for programs that call them
pth                the one-line .pth file that starts `auto` in every process of a Python installation
vllm, sglang       plugins for their loaders, through their own entry points
vllm_sleep         a backend of vLLM's sleep mode: weights sleep in the server
triton             a backend of Triton: model directories of safetensors and a configuration
weights            what vLLM's and SGLang's hand over: every tensor of a model's files
ranks              the same for ranks that load together: each byte read once among them
resident           the server, or None with one line in the log
counts             what came from where, for tests and the curious

HOOKS.md, one folder up, is for users: what each does, how to switch it on, what it ran with, what happens on failure.
"""
