"""The examples on each command's page: what people type first."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, str] = {
    "serve": """\
gpuload serve                                       4 GiB of host memory
gpuload serve --arena cuda:0=70G --arena cuda:1=70G
gpuload serve --arena cuda:0=70G --floor cuda:0=40G    40 are taken at once and kept
gpuload serve --arena cuda:0=70G --ram-tier 200G       what is evicted comes back at link speed
gpuload serve --arena cuda:0=70G --mode 660         the socket's group may attach, too""",
    "load": """\
gpuload load /mnt/models/llama --device cuda:0
gpuload load /mnt/models/llama --name chat --pin
gpuload load /mnt/models/llama --explain    where the time went
gpuload load /mnt/models/llama --ranks cuda:0,cuda:1
gpuload load /mnt/models/llama --device-map model=cuda:0 --device-map =cuda:1""",
    "swap": """\
gpuload swap /mnt/models/llama-b                     where one model is resident
gpuload swap /mnt/models/llama-b --name llama
gpuload swap /mnt/models/llama-b --name llama --allow-gap""",
    "unload": """\
gpuload unload llama
gpuload unload llama --device cuda:1    where several devices have one of that name""",
    "resize": """\
gpuload resize cuda:0 20G                       the rest is the engine's
gpuload resize cuda:0 0 --evict                 all of it
gpuload resize cuda:0 70G --wait 60 --floor 70G    have it again, as soon as the engine sleeps""",
    "pin": """\
gpuload pin llama
gpuload pin llama --off""",
    "status": """\
gpuload status
gpuload status --json | jq '.devices[].models[].model'""",
    "wait": """\
gpuload wait llama                    until it is resident
gpuload wait llama --after 3 --timeout 600 && systemctl reload chat
gpuload wait llama --after "$(gpuload status --json | jq .generation)"    until whatever comes next of it""",
    "metrics": """\
gpuload metrics
gpuload metrics --json | jq '.[] | select(.name == "gpuload_load_seconds")'
gpuload serve --metrics-addr 127.0.0.1:9401 …    the same for Prometheus, at /metrics""",
    "plan": """\
gpuload plan /mnt/models/llama
gpuload plan /mnt/models/llama --kv-cache 32768 --device cuda:0
gpuload plan /mnt/models/llama --device-map map.json
gpuload plan /mnt/models/llama-a /mnt/models/llama-b --device-memory 80G --kv-dtype fp8""",
    "doctor": """\
gpuload doctor
gpuload doctor --device cuda:0           what that card lacks is a fault
gpuload doctor --json | jq .compatibility""",
    "digest": """\
gpuload digest /mnt/models/llama-b
gpuload digest /mnt/models/llama-b --world 4    for ranks of four""",
    "bench": """\
gpuload bench --size 4G --dir /nvme
gpuload bench --device cuda:0 --size 16G
gpuload bench --modelled --size 2G                   without a GPU""",
    "run": """\
gpuload run -- python server.py
gpuload run -- vllm serve /mnt/models/llama""",
    "hook": """\
gpuload hook install && GPULOAD_AUTO=1 python server.py
gpuload hook remove""",
    "include": """\
cc -std=c11 -I"$(gpuload include)" program.c -o program""",
}
