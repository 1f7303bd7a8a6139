"""`dnt generate`: text by a run's checkpoint, of one prompt or of a file of them."""

import argparse
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from dnt_scale.arguments import Parser, number, path, prompt, whole, word
from dnt_scale.cli.run_options import add_run, add_tokenizer_data

if TYPE_CHECKING:
    from data_prep.progress import StageProgress
    from dnt_scale.distributed.process_group import Ranks
    from dnt_scale.tools.generate import Asked
    from dnt_scale.tools.inference import Trained

BATCH = 16

GENERATE_HELP = """\
One prompt's text is shown as it is sampled. FILE has a prompt a line, or, if it is named .jsonl,
JSON objects with a field "prompt"; what becomes of each is a JSON object with its index, prompt,
text, tokens and end ("document", "stop" or "length"). Those for --out are in OUT.partial until all
are finished; after Ctrl-C or kill -9 the same command goes on with the others. Each prompt draws
from a generator of its own, made of --seed and its index: neighbours and --batch change no text.

  dnt generate runs/demo --prompt "def read("
  dnt generate runs/demo --prompt "def read(" --stop "def " --top-k 0 --top-p 0.95
  dnt generate runs/demo --prompts questions.jsonl --out answers.jsonl --batch 32 --tokens 100

A text may be longer than model.context: whenever it is about to outgrow that, the model lets go of
the older half of what it sees and reads the rest again.
"""


def add_generate(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt generate`."""
    generate = commands.add_parser(
        "generate",
        help="sample text from a run",
        epilog=GENERATE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(generate)
    generate.add_argument("--prompt", type=prompt, metavar="TEXT", help="text to go on from")
    generate.add_argument("--prompts", type=path, metavar="FILE", help="prompts, instead of one")
    generate.add_argument(
        "--out", type=path, help="JSON lines to write for --prompts (default: standard output)"
    )
    generate.add_argument(
        "--batch",
        type=whole(1, 1 << 16),
        metavar="N",
        help=f"prompts that are continued beside each other (default: {BATCH})",
    )
    generate.add_argument(
        "--tokens",
        type=whole(0),
        default=200,
        metavar="N",
        help="tokens to sample, at most (default: 200)",
    )
    add_sampling(generate)
    add_tokenizer_data(generate)
    generate.set_defaults(run=run_generate)


def add_sampling(generate: Parser) -> None:
    """Add how a token is chosen."""
    generate.add_argument(
        "--temperature",
        type=number(0),
        default=0.8,
        metavar="X",
        help="0: always the most likely token (default: 0.8)",
    )
    generate.add_argument(
        "--top-k",
        type=whole(0),
        default=50,
        metavar="K",
        help="only the k most likely tokens; 0: all (default: 50)",
    )
    generate.add_argument(
        "--top-p",
        type=number(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="only the most likely tokens that have this probability together (default: 1)",
    )
    generate.add_argument(
        "--min-p",
        type=number(0, 1),
        default=0.0,
        metavar="P",
        help="only tokens at least this times as likely as the most likely one (default: 0)",
    )
    generate.add_argument(
        "--repetition-penalty",
        type=number(0.01, 100),
        default=1.0,
        metavar="X",
        help="above 1: tokens that the text has already become less likely (default: 1)",
    )
    generate.add_argument(
        "--stop",
        type=word,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    generate.add_argument(
        "--seed",
        type=whole(0, 2**64 - 1),
        default=0,
        metavar="N",
        help="the same seed gives the same text (default: 0)",
    )


def run_generate(options: argparse.Namespace) -> int:
    if options.prompts is None:
        for name in ("out", "batch"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name}: goes with --prompts FILE; leave it out, or give both")
    elif options.prompt is not None:
        raise ValueError("--prompt and --prompts: found both; give one prompt or a file of them")
    from dnt_scale.distributed import process_group
    from dnt_scale.tools.generate import Asked
    from dnt_scale.tools.inference import checkpoint_of
    from dnt_scale.tools.sampling import Sampling

    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    asked = Asked(options.tokens, sampling, options.seed, tuple(options.stop))
    with process_group.alone() as ranks:
        trained = checkpoint_of(options.folder, options.step)
        if options.prompts is None:
            show_one(options, trained, asked, ranks)
        elif options.out is None:
            show_all(options, trained, asked, ranks)
        else:
            write_all(options, trained, asked, ranks)
    return 0


def show_one(
    options: argparse.Namespace, trained: "Trained", asked: "Asked", ranks: "Ranks"
) -> None:
    """Print a prompt and what follows as it comes; then, on stderr, how fast it came."""
    from dnt_scale.record.files import warn
    from dnt_scale.tools.generate import load_writer

    writer = load_writer(trained, ranks, asked, options.data)
    started, tokens = time.monotonic(), 0
    try:
        for piece in writer.stream(options.prompt or ""):
            print(piece.text, end="", flush=True)
            tokens = piece.tokens
    finally:  # after Ctrl-C too, what is said next has a line of its own
        print()
    seconds = max(time.monotonic() - started, 1e-3)
    warn(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")


def show_all(
    options: argparse.Namespace, trained: "Trained", asked: "Asked", ranks: "Ranks"
) -> None:
    """Print what becomes of each prompt, in their order."""
    from dataclasses import asdict

    import orjson

    from dnt_scale.tools.generate import load_writer
    from dnt_scale.tools.prompts import Continuation, read_prompts

    prompts = read_prompts(options.prompts)
    writer = load_writer(trained, ranks, asked, options.data)
    waiting: dict[int, Continuation] = {}
    shown, out = 0, sys.stdout  # a bar puts another in its place
    with progress_of(len(prompts), quiet=out.isatty()) as progress:
        for tokens, finished in writer.each(prompts, options.batch or BATCH):
            progress(len(finished), tokens=tokens)
            waiting |= {each.index: each for each in finished}
            while shown in waiting:
                print(orjson.dumps(asdict(waiting.pop(shown))).decode(), file=out, flush=True)
                shown += 1


def write_all(
    options: argparse.Namespace, trained: "Trained", asked: "Asked", ranks: "Ranks"
) -> None:
    """Write what becomes of each prompt to a file, without those that are there already."""
    from dnt_scale.record.files import warn
    from dnt_scale.tools.generate import load_writer, made_with
    from dnt_scale.tools.prompts import Continuations, read_prompts

    out: Path = options.out
    prompts = read_prompts(options.prompts)
    with Continuations(out, made_with(trained.state, prompts, asked)) as continuations:
        there = frozenset(continuations.lines)
        if there:
            warn(f"{continuations.partial}: goes on, {len(there):,} of {len(prompts):,} are there")
        writer = load_writer(trained, ranks, asked, options.data)
        with progress_of(len(prompts) - len(there)) as progress:
            for tokens, finished in writer.each(prompts, options.batch or BATCH, there):
                for each in finished:
                    continuations.add(each)
                progress(len(finished), tokens=tokens)
        continuations.finish()
    print(f"{out}: {len(prompts):,} texts")


def progress_of(prompts: int, *, quiet: bool = False) -> "AbstractContextManager[StageProgress]":
    """Show on stderr how many prompts are finished, with a rate and the time left."""
    from rich.console import Console

    from data_prep.progress import stage

    return stage(Console(stderr=True, quiet=quiet), "generate", prompts, "prompts")
