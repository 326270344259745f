"""The commands and their options; what they print is in ``tilewright.cli.show``."""

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tilewright.cli.console import err, out
from tilewright.errors import InputError, TilewrightError

app = typer.Typer(
    name="tilewright",
    help="Compile a Hugging Face transformer into Triton kernels, look at each step, export it, run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_STOPPED = 130

Model = Annotated[str, typer.Argument(help="a local folder, a hub name, or a file (config.json, .safetensors)")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Level = Annotated[int, typer.Option("--opt-level", min=0, max=3, help="0 oracle, 1 packing, 2 fusion, 3 longer tuning")]
Unpad = Annotated[str, typer.Option(help="auto, on (refuse rather than pad) or off")]
Gemm = Annotated[str, typer.Option(help="auto, triton or vendor")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's")]


def run_app() -> None:
    """Runs the command line; errors of ours become one message and exit code 1, Ctrl-C exits with 130.

    Output that nobody reads any more ends it silently with exit code 1, which is typer's own doing.
    """
    try:
        # typer turns Ctrl-C into an exit, and an exit into a result.
        code = app(standalone_mode=False)
    except TilewrightError as error:
        _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _STOPPED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            sys.exit(getattr(error, "exit_code", 2))
        raise
    if code == _STOPPED:
        err.print("stopped")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: TilewrightError) -> NoReturn:
    if "--json" in sys.argv:
        fields = {"error": type(error).__name__, "what": error.what, "where": str(error.where or "")}
        print(json.dumps(fields | {"why": error.why, "do": error.hint}))
    else:
        err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        err.print(str(error), markup=False, highlight=False)
    sys.exit(1)


@app.command("compile")
def compile_command(
    model: Model,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for graph JSON, weights and kernel text")],
    opt_level: Level = 2,
    unpad: Unpad = "auto",
    gemm: Gemm = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compile MODEL and save it: graph JSON, safetensors, kernel text; no pickle."""
    from tilewright.cli import show, work

    loaded, compiled, seconds = work.compile_model(model, opt_level, unpad, gemm, dtype, quiet=as_json)
    work.save(compiled, loaded, out_dir)
    show.compiled(out, compiled, seconds, str(out_dir), as_json)


@app.command()
def run(
    model: Model,
    text: Annotated[list[str] | None, typer.Option("--text", help="a text; may be repeated")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="one text a line")] = None,
    batch: Annotated[int, typer.Option(min=1, help="texts in one call")] = 32,
    save_to: Annotated[Path | None, typer.Option("--save", help="write all outputs to this .safetensors file")] = None,
    opt_level: Level = 2,
    unpad: Unpad = "auto",
    gemm: Gemm = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Run MODEL, or a folder made by `tilewright compile`, on texts."""
    from tilewright.cli import show, work

    texts = [*(text or []), *(work.read_lines(file) if file else [])]
    if not texts:
        raise InputError("nothing to run on", hint="give --text 'some text' or --file FILE")
    loaded, compiled = work.open_any(model, opt_level, unpad, gemm, dtype, quiet=as_json)
    results = work.run_texts(compiled, loaded, texts, batch, quiet=as_json)
    if save_to is not None:
        work.save_outputs(results, save_to)
    show.results(out, texts, results, compiled, as_json)


@app.command()
def inspect(
    model: Model,
    diff: Annotated[bool, typer.Option("--diff/--no-diff", help="show each pass's changes to the graph")] = True,
    lines: Annotated[int, typer.Option(help="lines of each diff; 0 for all")] = 40,
    kernels: Annotated[bool, typer.Option(help="print the Triton source of every kernel")] = False,
    opt_level: Level = 2,
    unpad: Unpad = "auto",
    gemm: Gemm = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show what each pass did to MODEL, why something was not done, and the kernels made."""
    from tilewright.cli import show, work

    report = work.inspect_model(model, opt_level, unpad, gemm, dtype, quiet=as_json)
    show.inspection(out, report, diff, lines, kernels, as_json)


@app.command()
def export(
    model: Model,
    file_format: Annotated[str, typer.Option("--format", help="onnx, json, dot or graphml")],
    level: Annotated[str, typer.Option(help="normalized, packed, fused, specialized or placed")] = "packed",
    out_file: Annotated[Path | None, typer.Option("--out", help="file to write; default: MODEL's name")] = None,
    unpad: Unpad = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Export MODEL's graph at a level."""
    from tilewright.cli import show, work

    path = work.export_model(model, file_format, level, out_file, unpad, dtype)
    show.fields(out, {"written": str(path), "bytes": path.stat().st_size, "level": level}, as_json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a local folder, a hub name, or a .gguf file")],
    prompt: Annotated[str | None, typer.Option(help="the text to go on from, or that an encoder-decoder reads")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="or a file that has it; -: standard input")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens to make")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    sample: Annotated[bool | None, typer.Option("--sample/--greedy", help="default: as the model says")] = None,
    temperature: Annotated[float | None, typer.Option(help="of sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="of sampling: most tokens to choose from")] = None,
    top_p: Annotated[float | None, typer.Option(help="of sampling: probability of the tokens to choose from")] = None,
    min_p: Annotated[float | None, typer.Option(help="of sampling: least probability beside the likeliest")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="above 1: less of what was said")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="a text that ends it; may be repeated")] = None,
    prompt_lookup: Annotated[int | None, typer.Option(min=1, help="tokens drafted out of the prompt a step")] = None,
    opt_level: Level = 2,
    gemm: Gemm = "auto",
    dtype: Dtype = None,
    kv_dtype: Annotated[str | None, typer.Option(help="of kept keys and values: fp32, bf16, fp16 or int8")] = None,
    as_json: Json = False,
) -> None:
    """Stream the text that MODEL writes behind a prompt or, as an encoder-decoder, about it; and show how fast."""
    from tilewright.cli import generate as command
    from tilewright.cli import show
    from tilewright.cli.work import parse_dtype
    from tilewright.driver.options import CompileOptions

    asked = {
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop_strings": stop,
        "prompt_lookup_num_tokens": prompt_lookup,
    }
    options = {name: value for name, value in asked.items() if value not in (None, [])}
    if sample is None and not {"temperature", "top_k", "top_p", "min_p"}.isdisjoint(options):
        options["do_sample"] = True
    options["max_new_tokens"] = max_new_tokens
    text = command.read_prompt(prompt, prompt_file)
    choices = CompileOptions(parse_dtype(dtype), opt_level, gemm=gemm, kv_dtype=kv_dtype)
    loaded = command.open_model(model)
    ids = command.prompt_ids(loaded.tokenizer, text, chat)
    opened = command.compile_model(loaded, ids, options, choices, quiet=as_json)
    outcome = command.stream(opened, ids, options, seed, show=not as_json)
    figures = command.report(outcome, opened.traffic)
    if as_json:
        show.fields(out, {"text": outcome.text, "stopped": outcome.stopped, **figures}, as_json)
    else:
        show.fields(err, figures, as_json)
    if outcome.stopped:
        raise typer.Exit(_STOPPED)


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions, the CPU that kernels are compiled for, settings and the cache."""
    from tilewright.cli import environment, show

    show.sections(out, environment.describe(), as_json)


@app.command()
def demo(
    opt_level: Level = 2,
    batch: Annotated[int, typer.Option(min=1, help="passages in one call")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds over the passages")] = 3,
    query: Annotated[str, typer.Option(help="what to look for")] = "a man is swallowed by a great fish",
    as_json: Json = False,
) -> None:
    """Compile MiniLM-L6, embed the sample passages, compare with eager, and find passages."""
    from tilewright.cli import demo as demo_command

    demo_command.run_demo(out, opt_level, batch, rounds, query, as_json)
