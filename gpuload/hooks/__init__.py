"""Ways into unmodified programs. Each is thin: it finds the moment, and calls the client. Off unless asked for.

auto               what `gpuload run` and the .pth start: waits for safetensors to be imported, then patches it
safetensors_patch  safe_open and its slices served from the resident server
pth                the one-line .pth file that starts `auto` in every process of a Python installation
vllm               a plugin for vLLM's own loader registry
"""
