"""`mfs triton`: what an operator of Triton needs besides the mount: a backend for safetensors, and repositories."""

from __future__ import annotations

from pathlib import Path

import click

from mfs.cli.page import Page, Pages, json_option
from mfs.cli.text import clean, count, print_json, size


@click.group(cls=Pages, short_help="Prepare Triton: a backend for safetensors, model repositories.")
def triton() -> None:
    """Prepare NVIDIA Triton: install a backend that serves plain safetensors, write a model repository.

    A mount needs neither: point --model-repository at it. RECIPES.md, beside mfs's code, says which flags help.
    """


@triton.command(
    cls=Page,
    short_help="Install the backend for safetensors.",
    sections={
        "Examples": """\
mfs triton backend /opt/tritonserver/backends
tritonserver --model-repository=/mnt/models --backend-directory=/opt/tritonserver/backends""",
        "What it serves": """\
A model whose config.pbtxt says  backend: "gpuload"  needs in its version directories
safetensors files and nothing else. What computes is named in the configuration:
     parameters { key: "model" value { string_value: "transformers:BertModel" } }
as module:name or file.py:name, the file beside the weights or in the model's directory:
     a class with from_pretrained   built from the config.json beside the weights
     a torch.nn.Module class        built without arguments; its state is the weights
     any other callable             called with {name: tensor}, returns what is called
It is called for each request with the inputs by name as tensors, and returns a mapping
by output name, a sequence, or the one output. Requests are not joined into batches.""",
        "Memory": """\
Weights are read whole when the model is loaded, so that a fault is a failed load. Where
'gpuload serve' runs (as Triton's user), all instances of a version share one copy, and
versions and models share their equal tensors of 16 MiB and more; otherwise each instance
has its own. $GPULOAD_SOCKET in Triton's environment names another socket.""",
        "Needs": """\
gpuload and torch in the Python that Triton's python backend starts ('python3' on the
server's PATH; PYTHONPATH is ignored there), Python 3.11 or newer.""",
        "Files": "DIR/gpuload/model.py, which imports gpuload.hooks.triton",
    },
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def backend(directory: Path, as_json: bool) -> None:
    """Install the backend "gpuload" into DIR, Triton's backend directory.

    Doing it again is harmless. A file of another origin in its place is left alone, and said.
    """
    from mfs.triton import install_backend

    path = install_backend(directory)
    if as_json:
        print_json({"backend": "gpuload", "path": str(path)})
    else:
        print(f'{clean(str(path))}: installed; models with  backend: "gpuload"  use it')


@triton.command(
    cls=Page,
    short_help="Write a model repository.",
    sections={
        "Examples": """\
mfs triton init /mnt/models/minilm ./repository                a transformers model
mfs triton init ./retrained ./repository --name minilm --version 2
mfs triton init ./scorer ./repository --model net.py:Net \\
                --input x:FP32:16 --output score:FP32:1
aws s3 sync ./repository s3://models/triton                    and mount that""",
        "What it writes": """\
REPOSITORY/NAME/config.pbtxt         backend "gpuload" ('mfs triton backend'), the parameter
                                     "model", inputs and outputs; kept where it exists
REPOSITORY/NAME/VERSION/             MODEL_DIR's safetensors, their index, config.json and
                                     *.py
A version appears whole or not at all (written beside REPOSITORY, then renamed).""",
        "Inputs and outputs": """\
NAME:TYPE:DIMS, as in  x:FP32:16  or  tokens:INT64:-1,-1 ; -1 is any length. Dimensions do not
include the batch's unless --max-batch-size is 0, the default.
Not needed for a transformers folder (config.json with "architectures") of the kinds …Model,
…ForSequenceClassification, …ForTokenClassification, …ForMaskedLM, …ForCausalLM:
input_ids, attention_mask and the last hidden state or the logits.""",
    },
)
@click.argument("model_dir", metavar="MODEL_DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPOSITORY", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Of the model. Default: the folder's name.")
@click.option("--version", type=click.IntRange(min=1), default=1, show_default=True, help="Directory of the weights.")
@click.option("--model", "computes", metavar="WHAT", help="What computes: module:name or file.py:name.")
@click.option("--input", "inputs", multiple=True, metavar="NAME:TYPE:DIMS", help="An input; may be repeated.")
@click.option("--output", "outputs", multiple=True, metavar="NAME:TYPE:DIMS", help="An output; may be repeated.")
@click.option(
    "--max-batch-size", type=click.IntRange(min=0), default=0, show_default=True, help="As Triton's max_batch_size."
)
@click.option("--link", is_flag=True, help="Symbolic links to the files of MODEL_DIR instead of copies.")
@json_option
def init(
    model_dir: Path,
    repository: Path,
    name: str | None,
    version: int,
    computes: str | None,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    max_batch_size: int,
    link: bool,
    as_json: bool,
) -> None:
    """Write a minimal model repository for Triton from a folder with safetensors.

    REPOSITORY is a local folder, made if it is not there; it serves from there, or from a bucket it is copied to.
    """
    from mfs.triton import Interface, write_repository

    interface = Interface(computes=computes, inputs=inputs, outputs=outputs, max_batch_size=max_batch_size)
    written = write_repository(model_dir, repository, name=name, version=version, interface=interface, link=link)
    if as_json:
        print_json(
            {
                "model": written.model, "version": version, "path": str(written.path), "config": str(written.config),
                "config_written": written.is_config_new, "files": [str(path) for path in written.files],
                "bytes": written.bytes,
            }
        )  # fmt: skip
        return
    what = f"{count(len(written.files), 'file')}, {size(written.bytes)}"
    print(f"{clean(str(written.path))}: {what}{', linked' if link else ''}")
    print(f"{clean(str(written.config))}: {'written' if written.is_config_new else 'kept as it was'}")
