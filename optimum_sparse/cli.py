"""`optimum-cli sparse ...`, also `python -m optimum_sparse ...`: the subcommands are in `add_commands`."""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from . import ranks
from .config import ALLOCATIONS, RECIPES, REFINEMENTS, SECOND_ORDER, SparsityConfig, check_keys
from .core import NM, parse_pattern
from .evaluation import (
    Perplexity,
    TaskScore,
    check_allocation,
    grid,
    measure_sensitivity,
    measure_speed,
    perplexity,
    plot_sensitivity,
    plot_sweep,
    score_tasks,
    sweep,
)
from .hf.checkpoint import (
    REPORT_FILE,
    atomically,
    check_folder,
    export_dense,
    find_tokenizer,
    inspect,
    load_config,
    load_model,
    read_config,
    read_json,
    read_report,
    write_report,
)
from .hf.convert import convert, export_csr, survey
from .hf.hub import check_access, push, write_card
from .hf.placement import usable_device
from .kernels.linear import Choice, select
from .methods import METHODS
from .pruner import SPREAD, Pruner
from .report import Measurement, aligned


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the subcommands. After parsing, `args.run_sparse(args)` runs the one that was chosen."""
    commands = parser.add_subparsers(
        title="commands", metavar="{prune,eval,sweep,sensitivity,info,export,convert,bench}", required=True
    )
    _add_prune(commands)
    _add_eval(commands)
    _add_sweep(commands)
    _add_sensitivity(commands)
    _add_info(commands)
    _add_export(commands)
    _add_convert(commands)
    _add_bench(commands)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m optimum_sparse", description="Prune and measure sparse language models."
    )
    add_commands(parser)
    args = parser.parse_args(arguments)
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command. What the user can mend is printed as one line, without a traceback."""
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda message, *where, **more: f"warning: {message}\n"
    try:
        args.run_sparse(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # as shells have it
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError, ranks.OtherProcessFailed) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = formatted
    return 0


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        # All options would be a page above the mistake that is named.
        usage=f"%(prog)s ...  (all options: --help)\nexample: optimum-cli sparse {name} {example}",
        help=summary,
        description=summary,
    )


def _add_loading(
    parser: argparse.ArgumentParser, auto: str = "all GPUs, and other memory for what does not fit there"
) -> None:
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: as stored [auto]"
    )
    group.add_argument("--device-map", default="auto", help=f"cpu, cuda, ...; auto: {auto} [auto]")
    _add_trust(group)


def _add_trust(group: Any) -> None:
    group.add_argument("--trust-remote-code", action="store_true", help="run model code that comes from the hub")


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    if args.device_map not in ("auto", *SPREAD):
        usable_device(args.device_map)
    return {"dtype": args.dtype, "device_map": args.device_map, "trust_remote_code": args.trust_remote_code}


def _load(args: argparse.Namespace, source: str, **more: Any) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer)"""
    load_config(source, trust_remote_code=args.trust_remote_code)  # says what is wrong with it
    tokenizer = find_tokenizer(source, trust_remote_code=args.trust_remote_code)
    if tokenizer is None:
        raise ValueError(
            f"{source!r} has no tokenizer that can be loaded, and text needs one: save that of the dense model there, "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({source!r})."
        )
    return load_model(source, **_loading(args), **more), tokenizer


def _add_prune(commands: Any) -> None:
    defaults = {field.name: field.default for field in fields(SparsityConfig)}
    parser = _command(
        commands,
        "prune",
        "Prune a causal language model and save it compressed, with its tokenizer and a report. One decoder block is "
        "in memory at a time; after an interruption the same command goes on where it was.",
        "org/model --pattern 2:4 --dataset c4 --output model-2of4",
    )
    parser.add_argument("model", help="id on the hub, or a folder")
    parser.add_argument("--output", "-o", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--max-shard-size",
        default="50GB",
        type=lambda text: int(text) if text.isdigit() else text,
        help="largest weight file: 500MB, 5GB, or bytes [50GB]",
    )
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="and upload it, with its model card, to this id")
    recipe = parser.add_argument_group("recipe", "everything that is not given takes SparsityConfig's default")
    recipe.add_argument(
        "--config",
        help="JSON with the fields of SparsityConfig, or a sparse checkpoint's config.json; options given here win",
    )
    recipe.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        help="best: least loss, with training of each block; fast: least loss without; paper: methods as published",
    )
    recipe.add_argument("--method", choices=sorted(METHODS), help=f"[{defaults['method']}]")
    recipe.add_argument(
        "--pattern", help=f"2:4, 4:8, 16:32, any N:M (N kept of M), or unstructured [{defaults['pattern']}]"
    )
    recipe.add_argument("--sparsity", type=float, help="share to remove when unstructured [0.5]")
    recipe.add_argument(
        "--layer",
        dest="layers",
        action="append",
        metavar="NAME=VALUE",
        help="another pattern, sparsity, or 'dense' for some layers: down_proj=4:8; can be given again",
    )
    recipe.add_argument("--refine", choices=REFINEMENTS, help="solve again for kept weights; or train them, too")
    recipe.add_argument(
        "--allocation", choices=ALLOCATIONS, help=f"of unstructured sparsity [{defaults['allocation']}]"
    )
    _add_recipe(parser, recipe)
    _add_loading(parser, auto="the GPU, if there is one")
    parser.set_defaults(run_sparse=_prune)


def _add_recipe(parser: argparse.ArgumentParser, group: Any) -> None:
    """What every command that prunes takes: which layers, other fields, and the data."""
    group.add_argument(
        "--targets", nargs="+", metavar="NAME", help="prune only linears that match: q_proj, mlp, 're:...'"
    )
    group.add_argument("--ignore", nargs="+", metavar="NAME", help="leave these dense")
    group.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any other field of SparsityConfig, as JSON: damping=0.1, fisher=false; can be given again",
    )
    group.add_argument("--block-name", help="where the decoder blocks are, if they are not found: model.layers")
    defaults = {field.name: field.default for field in fields(SparsityConfig)}
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--dataset",
        help="c4, wikitext2, org/name[:subset] on the hub, a .txt/.jsonl/.parquet file, or 'self': text that the "
        f"model samples itself, which needs no data [{defaults['dataset']}]",
    )
    for name in ("num_samples", "sequence_length", "batch_size", "seed"):
        data.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"[{defaults[name]}]")


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SparsityConfig that were given, by options of their own or by --set."""
    given = {field.name: getattr(args, field.name, None) for field in fields(SparsityConfig)}
    more = dict(map(_setting, args.set or []))
    check_keys(more)
    return {name: value for name, value in given.items() if value is not None} | more


def _prune(args: argparse.Namespace) -> None:
    if args.config and args.recipe:
        raise ValueError("--config and --recipe: a stored config holds every field; give one of them.")
    options = read_json(Path(args.config)) if args.config else {}
    options = options.get("quantization_config", options)  # of a checkpoint's config.json
    if args.method:  # a stored config says what its own method did
        options = {name: value for name, value in options.items() if name not in SECOND_ORDER}
    options |= _recipe(args)
    if args.layers:
        options["layers"] = dict(_override(text) for text in args.layers)
    if args.pattern and args.pattern != "unstructured" and args.sparsity is None:
        options.pop("sparsity", None)  # a file's sparsity belongs to the file's pattern
    config = SparsityConfig.recipe(args.recipe, **options) if args.recipe else SparsityConfig.from_dict(options)
    if args.push_to_hub:
        check_access(args.push_to_hub)  # before all the work
    with _process_group(cpu=args.device_map == "cpu"):
        pruner = Pruner.from_pretrained(args.model, **_loading(args))
        pruner.prune_to_disk(config, args.output, max_shard_size=args.max_shard_size)
        first = ranks.rank() == 0
        with ranks.together():  # who leaves may fail as it ends, and torchrun then ends the others
            if first:
                print(pruner.report)
                print(inspect(args.output, trust_remote_code=args.trust_remote_code))
    if first and args.push_to_hub:
        try:
            print(push(args.output, args.push_to_hub).repo_url)
        except OSError as error:
            again = f"hf upload {args.push_to_hub} {args.output}"
            raise OSError(f"{error} The checkpoint is complete: `{again}` uploads it.") from error


@contextlib.contextmanager
def _process_group(cpu: bool) -> Iterator[None]:
    """Of the processes that `accelerate launch` or `torchrun` has started, if there are several."""
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    state = PartialState(cpu=cpu)
    try:
        yield
    finally:
        state.destroy_process_group()


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text!r}: must be NAME=VALUE, such as damping=0.1.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _override(text: str) -> tuple[str, str | float]:
    name, _, value = text.rpartition("=")
    if not name:
        raise ValueError(f"--layer {text!r}: must be NAME=VALUE, such as down_proj=4:8 or model.layers.0=dense.")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        "Measure a model, dense or sparse: perplexity on a text, accuracy at zero-shot tasks.",
        "model-2of4 --tasks lambada_openai piqa --dense org/model",
    )
    parser.add_argument("model", help="id on the hub, or a folder")
    parser.add_argument(
        "--dataset",
        help="text for the perplexity: wikitext2 (hub), another hub name, or a local file [wikitext2, if there are no "
        "--tasks]",
    )
    _add_windows(parser)
    _add_tasks(parser)
    parser.add_argument("--batch-size", type=int, help="per forward pass [1 window, or 16 items]")
    parser.add_argument("--run-compressed", action="store_true", help="keep the weights compressed in memory")
    parser.add_argument("--dense", metavar="MODEL", help="also measure this one, the model before pruning")
    parser.add_argument("--save", action="store_true", help="put the result into the folder's report and model card")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    _add_loading(parser)
    parser.set_defaults(run_sparse=_eval)


def _add_windows(parser: Any) -> None:
    parser.add_argument("--window", type=int, default=2048, help="tokens per window [2048]")
    parser.add_argument("--max-windows", type=int, help="only the first ones")


def _add_tasks(parser: Any) -> None:
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="local .jsonl files, folders of them, names that lm-eval knows, or YAML files in its format; see "
        "optimum_sparse.evaluation.tasks",
    )
    parser.add_argument("--max-items", type=int, help="of each task, only the first ones")


def _eval(args: argparse.Namespace) -> None:
    report = read_report(Path(args.model))
    if args.save:
        if report is None:
            raise ValueError(f"--save: {args.model!r} must be the folder of a sparse checkpoint, with {REPORT_FILE}.")
        read_config(args.model, trust_remote_code=args.trust_remote_code)  # a dense one may lie beside an old report
        check_folder(args.model)
    load_config(args.model, trust_remote_code=args.trust_remote_code)  # before the dense one is measured
    compressed = {"run_compressed": True} if args.run_compressed else {}
    dense = _measure(args, args.dense)[1] if args.dense else {}  # which is gone before the other is loaded
    model, found = _measure(args, args.model, **compressed)
    if args.save and report is not None:
        for name, result in found.items():
            report.measured(_measurement(args, result, dense.get(name)))
        write_report(args.model, report)
        write_card(args.model, model, report)
    if args.json:
        print(json.dumps(_as_json(found) | ({"dense": _as_json(dense)} if dense else {})))
        return
    rows = [("", args.model, *([args.dense] if dense else []))]
    rows += [(name, *(str(results[name]) for results in (found, dense) if results)) for name in found]
    print("\n".join(aligned(rows)))


def _measure(
    args: argparse.Namespace, source: str, **loading: Any
) -> tuple[PreTrainedModel, dict[str, Perplexity | TaskScore]]:
    """What is asked for, of one model."""
    model, tokenizer = _load(args, source, **loading)
    found: dict[str, Perplexity | TaskScore] = {}
    batch = {} if args.batch_size is None else {"batch_size": args.batch_size}
    if args.dataset or not args.tasks:
        sizes = {"window": args.window, "max_windows": args.max_windows} | batch
        found["perplexity"] = perplexity(model, tokenizer, args.dataset or "wikitext2", **sizes)
    if args.tasks:
        scores = score_tasks(model, tokenizer, args.tasks, max_items=args.max_items, **batch)
        found |= {score.task: score for score in scores}
    return model, found


def _as_json(found: dict[str, Perplexity | TaskScore]) -> dict[str, Any]:
    """The perplexity's fields, and those of every task under its name in "tasks"."""
    tasks = {name: result.to_dict() for name, result in found.items() if isinstance(result, TaskScore)}
    both = found["perplexity"].to_dict() if "perplexity" in found else {}
    return both | ({"tasks": tasks} if tasks else {})


def _measurement(
    args: argparse.Namespace, result: Perplexity | TaskScore, dense: Perplexity | TaskScore | None
) -> Measurement:
    """As reports keep it."""
    error = result.standard_error
    if isinstance(result, TaskScore):
        before = dense.accuracy if isinstance(dense, TaskScore) else None
        return Measurement(result.metric, result.task, result.accuracy, error, before, f"{result.items} items")
    data = args.dataset or "wikitext2"
    note = f"{result.windows} windows of {result.window} tokens"
    before = dense.perplexity if isinstance(dense, Perplexity) else None
    return Measurement(
        "perplexity", Path(data).name if Path(data).is_file() else data, result.perplexity, error, before, note
    )


def _add_sweep(commands: Any) -> None:
    parser = _command(
        commands,
        "sweep",
        "Measure what methods cost at several sparsities and patterns, perplexity and accuracy at zero-shot tasks: as "
        "tables, JSON, CSV and pictures. The model is loaded once. After an interruption the same command goes on; "
        "with more methods, sparsities or patterns it measures only these.",
        "org/model --methods wanda sparsegpt fast --sparsities 0.3 0.5 0.7 --patterns 2:4 16:32 --output results",
    )
    parser.add_argument("model", help="id on the hub, or a folder")
    parser.add_argument(
        "--output", "-o", required=True, help="folder for sweep.json, sweep.csv and sweep.png, one more for each task"
    )
    recipe = parser.add_argument_group("recipes", "what is not given takes SparsityConfig's default")
    recipe.add_argument(
        "--methods",
        nargs="+",
        action=_Several,
        default=["magnitude", "wanda", "sparsegpt"],
        metavar="NAME",
        help=f"methods ({', '.join(METHODS)}) and recipes ({', '.join(RECIPES)}), as `prune` takes them "
        "[magnitude wanda sparsegpt]",
    )
    _add_tasks(_add_points(parser, recipe, "0.3 0.5 0.7"))
    parser.set_defaults(run_sparse=_sweep)


class _Several(argparse.Action):
    """Values with spaces or commas between them."""

    def __init__(self, *args: Any, of: Callable[[str], Any] = str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._of = of

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        parts = [part for value in values for part in value.split(",") if part]
        try:
            setattr(namespace, self.dest, [self._of(part) for part in parts])
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error


def _add_points(parser: argparse.ArgumentParser, recipe: Any, sparsities: str) -> Any:
    """What every command that prunes one model in several ways takes: how, and what to measure."""
    recipe.add_argument(
        "--sparsities", nargs="+", action=_Several, of=float, metavar="SHARE", help=f"unstructured [{sparsities}]"
    )
    recipe.add_argument(
        "--patterns",
        nargs="+",
        action=_Several,
        default=[],
        metavar="N:M",
        help="N kept of every M: 2:4, 4:8, 16:32 [none]",
    )
    _add_recipe(parser, recipe)
    _add_loading(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--text", default="wikitext2", help="for perplexity: as `eval --dataset` [wikitext2]")
    _add_windows(group)
    return group


def _evaluation(args: argparse.Namespace, tokenizer: Any) -> tuple[Callable[[Any], dict[str, float]], dict[str, Any]]:
    """What to measure of a model, and what the numbers depend on."""
    text = {"window": args.window, "max_windows": args.max_windows}

    def evaluate(model: Any) -> dict[str, float]:
        found = perplexity(model, tokenizer, args.text, **text)
        return _with_error("perplexity", found.perplexity, found.standard_error)

    return evaluate, {"text": args.text, **text}


def _with_error(name: str, value: float, error: float | None) -> dict[str, float]:
    return {name: value} | ({} if error is None else {f"{name}_stderr": error})


def _sweep(args: argparse.Namespace) -> None:
    sparsities = args.sparsities or ([] if args.patterns else [0.3, 0.5, 0.7])
    points = grid(args.methods, sparsities, args.patterns, **_recipe(args))
    model, tokenizer = _load(args, args.model)
    of_text, settings = _evaluation(args, tokenizer)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        found = of_text(model)
        for score in score_tasks(model, tokenizer, args.tasks or [], max_items=args.max_items):
            found |= _with_error(score.task, score.accuracy, score.standard_error)
        return found

    settings |= {"tasks": args.tasks, "max_items": args.max_items}
    result = sweep(model, points, evaluate, args.output, tokenizer=tokenizer, settings=settings)
    print(result)
    for metric in result.metrics:
        name = "sweep.png" if metric == result.metrics[0] else f"sweep-{metric.replace('/', '-')}.png"
        _draw(partial(plot_sweep, metric=metric), result, Path(args.output) / name)


def _add_sensitivity(commands: Any) -> None:
    parser = _command(
        commands,
        "sensitivity",
        "Measure what the model loses when only one matrix or one block is pruned: a table, JSON and a heat map. The "
        "model itself is not changed.",
        "org/model --sparsities 0.3 0.5 0.7 --allocate 0.5 --output results",
    )
    parser.add_argument("model", help="id on the hub, or a folder")
    parser.add_argument("--output", "-o", required=True, help="folder for sensitivity.json and sensitivity.png")
    parser.add_argument(
        "--by",
        choices=("error", "perplexity"),
        default="error",
        help="error: an estimate from one calibration pass; perplexity: an evaluation for every matrix, which takes "
        "thousands of tokens to tell from noise [error]",
    )
    parser.add_argument(
        "--allocate",
        type=float,
        metavar="SPARSITY",
        help="also write recipe.json, for `prune --config`: sparsities of all matrices that lose least at this one",
    )
    recipe = parser.add_argument_group("recipe", "what is not given takes SparsityConfig's default")
    recipe.add_argument("--method", choices=sorted(METHODS), help="by perplexity; by error always a SparseGPT sweep")
    _add_points(parser, recipe, "0.5")
    parser.set_defaults(run_sparse=_sensitivity)


def _sensitivity(args: argparse.Namespace) -> None:
    options = _recipe(args) | {"pattern": "unstructured"}
    sparsities = args.sparsities or ([] if args.patterns else [0.5])
    patterns = [parse_pattern("unstructured", sparsity) for sparsity in sparsities]
    patterns += [parse_pattern(pattern) for pattern in args.patterns]
    config = SparsityConfig.from_dict(options)
    if args.allocate is not None:
        check_allocation(sparsities, args.allocate)
    check_folder(args.output)
    model, tokenizer = _load(args, args.model)
    evaluate, _ = _evaluation(args, tokenizer)
    loss = None if args.by == "error" else lambda pruned: math.log(evaluate(pruned)["perplexity"])
    result = measure_sensitivity(model, config, patterns, loss, tokenizer=tokenizer)
    print(result)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    result.save(folder / "sensitivity.json")
    _draw(plot_sensitivity, result, folder / "sensitivity.png")
    if args.allocate is not None:
        chosen = {"sparsity": args.allocate, "allocation": result.allocation(args.allocate)}
        with atomically(folder / "recipe.json") as temporary:
            temporary.write_text(json.dumps(options | chosen, indent=1) + "\n", encoding="utf-8")


def _draw(plot: Callable[[Any, Path], None], result: Any, path: Path) -> None:
    """The picture, or why there is none: all else is written by now."""
    try:
        plot(result, path)
    except ImportError as error:
        print(f"no {path.name}: {error} Then repeat the command.", file=sys.stderr)
    except ValueError as error:  # nothing to see
        print(f"no {path.name}: {error}", file=sys.stderr)


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        "Read a checkpoint on disk, sparse or dense: zeros and exact patterns of every matrix, what it takes in other "
        "formats, and which kernel would run here. A sparse one is checked on the way.",
        "model-2of4",
    )
    parser.add_argument("model", help="a folder")
    parser.add_argument("--layers", action="store_true", help="a line for every matrix")
    _add_trust(parser)
    parser.set_defaults(run_sparse=_info)


def _info(args: argparse.Namespace) -> None:
    found = survey(args.model, trust_remote_code=args.trust_remote_code)
    if found.source.info is not None:
        print(found.source.info, end="\n\n")
    elif found.source.legacy is not None:
        print(f"{found.source.legacy}, which has to be converted: optimum-cli sparse convert", end="\n\n")
    if args.layers:
        print(found.per_matrix(), end="\n\n")
    print(found)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    smaller = [matrix for matrix in found.matrices if matrix.nbytes["bitmask"] < matrix.nbytes["dense"]]
    dtypes = sorted({matrix.dtype for matrix in smaller}, key=str)
    for dtype, run_compressed in itertools.product(dtypes, (True, "decode")):
        print(f"\ncompressed in memory, as by {run_compressed=}, here ({device}, {dtype}):")
        for tokens in (1, 8, 64, 512):
            layers: Counter[Choice] = Counter(
                select(device, dtype, matrix.stored, matrix.shape, tokens, beside_dense=run_compressed == "decode")
                for matrix in smaller
                if matrix.dtype == dtype
            )
            for choice, count in layers.items():
                print(f"  {tokens} tokens, {count} layers: {choice.backend}, {choice.reason}")
    if len(smaller) < len(found.matrices):
        print(f"\n{len(found.matrices) - len(smaller)} matrices have too few zeros to be smaller than dense")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        "Write a sparse checkpoint as an ordinary dense one, zeros in place, that loads anywhere (vLLM, plain "
        "transformers) without this package; or its matrices as torch.sparse_csr has them, for other software.",
        "model-2of4 --output model-dense",
    )
    parser.add_argument("model", help="id on the hub, or a folder; a folder for csr")
    parser.add_argument("--output", "-o", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--format", default="dense", choices=["dense", "csr"], help="[dense]")
    _add_trust(parser)
    parser.set_defaults(run_sparse=_export)


def _export(args: argparse.Namespace) -> None:
    if args.format == "dense":
        return export_dense(args.model, args.output, trust_remote_code=args.trust_remote_code)
    sizes = export_csr(args.model, args.output, trust_remote_code=args.trust_remote_code).nbytes
    print(
        f"sparse matrices as CSR {sizes['csr'] / 1e6:,.1f} MB: {sizes['csr'] / sizes['dense']:.2f} of dense, "
        f"{sizes['csr'] / sizes['bitmask']:.2f} of bitmask, which they were read from"
    )
    return None


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        "Read a checkpoint that compressed-tensors wrote as sparse-24-bitmask or sparse-bitmask, which its current "
        "releases and transformers do not, and write it in this package's format, or dense. Weights stay as they are.",
        "model-of-2024 --output model-2of4",
    )
    parser.add_argument("model", help="a folder")
    parser.add_argument("--output", "-o", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--dense", action="store_true", help="an ordinary checkpoint, zeros in place")
    _add_trust(parser)
    parser.set_defaults(
        run_sparse=lambda args: print(
            convert(args.model, args.output, args.dense, trust_remote_code=args.trust_remote_code)
        )
    )


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        "Time compressed layers beside dense ones on this machine, with random weights, and check their results.",
        "--pattern 2:4 --shapes 4096x4096 11008x4096 --tokens 1 2 4 8 16",
    )
    parser.add_argument("--pattern", default="2:4", help="N:M, or unstructured [2:4]")
    parser.add_argument("--sparsity", type=float, help="share of zeros when unstructured [0.5]")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"], metavar="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 256, 1024], help="rows of x")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda, else cpu]")
    parser.set_defaults(run_sparse=_bench)


def _bench(args: argparse.Namespace) -> None:
    pattern = parse_pattern(args.pattern, args.sparsity)
    shapes = [_shape(text) for text in args.shapes]
    if min(args.tokens) < 1:
        raise ValueError(f"--tokens {min(args.tokens)}: must be from 1 up.")
    for _, in_features in shapes:
        if isinstance(pattern, NM):
            pattern.check_width(in_features)
    device = usable_device(args.device)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{pattern}, {args.dtype}, {on}, torch {torch.__version__}; microseconds, ratio = dense / compressed")
    print(
        "| out x in | tokens | dense | compressed | ratio | eager ratio | PyTorch 2:4 | of a copy's bytes/s | runs |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        for speed in measure_speed(shape, args.tokens, pattern, getattr(torch, args.dtype), device):
            other = "-" if speed.torch_sparse is None else f"{speed.dense / speed.torch_sparse:.2f}"
            print(
                f"| {shape[0]} x {shape[1]} | {speed.tokens} | {speed.dense * 1e6:.1f} | {speed.sparse * 1e6:.1f} "
                f"| {speed.ratio:.2f} | {speed.dense_eager / speed.sparse_eager:.2f} | {other} "
                f"| {speed.ceiling:.0%} | {speed.choice.backend} |",
                flush=True,
            )


def _shape(text: str) -> tuple[int, int]:
    try:
        out_features, in_features = (int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"--shapes {text!r}: must be OUTxIN, such as 4096x11008.") from None
    if min(out_features, in_features) < 1:
        raise ValueError(f"--shapes {text!r}: both must be from 1 up.")
    return out_features, in_features
