"""The one command.

launch.py METHOD [--config FILE] [key=value ...]   run a method, or continue its run
launch.py METHOD --help                            all keys of a method
launch.py plan METHOD [--config FILE] [key=value ...]  what a run would start, where it goes, what does not fit
launch.py report RUN                               write a run's report anew
launch.py serve [--config FILE] [key=value ...]    actors behind a gateway, until they are told to stop
launch.py serve --detach [...]                     the same, without this terminal
launch.py status                                   runs of this machine whose gateway is up
launch.py stop RUN                                 end such a run; calls under way are finished
launch.py token NAME [ROLE ...]                    a new token for a caller, and its entry in the file of tokens
launch.py methods                                  all methods
"""

import argparse
import ast
import asyncio
import contextlib
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.cluster import Cluster
    from cluster.config import MethodConfig

METHODS = Path(__file__).parent / "methods"
BAD_INPUT, FAILED, ENDED_EARLY = 2, 1, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 1 failed, 2 bad input, 3 the run ended itself early,
    128 + n stopped by signal n."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    from protocols.errors import BadInput, RepertoryError

    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except RepertoryError as error:
        if error.__cause__ is not None and error.code == "INTERNAL":
            import traceback

            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def _dispatch(words: list[str]) -> int:
    from protocols.errors import BadInput

    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        return _overview()
    if command == "methods":
        return _list_methods()
    if command == "report":
        return _report(words[1:])
    if command in ("status", "stop"):
        return _gateways(command, words[1:])
    if command == "token":
        return _token(words[1:])
    only_plan = command == "plan"
    if only_plan:
        if len(words) < 2:
            raise BadInput("plan: expected a method and its keys")
        words = words[1:]
        command = words[0]
    if command == "serve" and "--detach" in words and not only_plan:
        return _detached([word for word in words if word != "--detach"])
    if command == "serve":
        return _method(command, words[1:], only_plan=only_plan, path="cluster.serve")
    if command not in method_summaries():
        return _unknown(command)
    return _method(command, words[1:], only_plan=only_plan)


def method_summaries() -> dict[str, str]:
    """First line of the docstring of every script in methods/ that has a `run`, by name."""
    found: dict[str, str] = {}
    for file in sorted(METHODS.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.AsyncFunctionDef) and node.name == "run" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def _overview() -> int:
    print(__doc__)
    print("Methods:")
    return _list_methods()


def _list_methods() -> int:
    for name, summary in method_summaries().items():
        print(f"  {name:12} {summary}")
    return 0


def _unknown(command: str) -> int:
    import difflib

    known = [*method_summaries(), "methods", "plan", "report", "serve", "status", "stop", "token"]
    near = difflib.get_close_matches(command, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
    print(f"error: {command!r} is neither a method nor a command{hint}", file=sys.stderr)
    return BAD_INPUT


def _report(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="launch.py report", description="Write the report of a run anew.")
    parser.add_argument("run", help="name of the run, or its folder")
    parser.add_argument("--runs-dir", default="runs", help="folder that holds the runs (default: runs)")
    options = parser.parse_args(words)
    from cluster.report import write_report
    from protocols.errors import BadInput

    folders = [Path(options.run), Path(options.runs_dir) / options.run]
    run = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
    if run is None:
        raise BadInput(f"report: no run at {' or '.join(map(str, folders))}")
    print(f"report: {write_report(run)}")
    return 0


def _gateways(command: str, words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"launch.py {command}")
    if command == "stop":
        parser.add_argument("run", help="name of the run")
        parser.add_argument("--deadline", type=float, default=120.0, help="seconds to wait (default: 120)")
    parser.add_argument("--runs-dir", default="runs", help="folder that holds the runs (default: runs)")
    options = parser.parse_args(words)
    from cluster.gateway.running import running, stop

    folder = Path(options.runs_dir).expanduser()
    if command == "stop":
        one = stop(folder, options.run, options.deadline)
        print(f"{one.run} has ended")
        return 0
    for one in running(folder):
        print(f"{one.run:20} {one.address:30} {one.http or '-':30} process {one.pid}")
    return 0


def _detached(words: list[str]) -> int:
    """Serve in a process of its own, and return when it is up or has failed."""
    from cluster.gateway.running import detach

    return detach([sys.executable, os.path.abspath(__file__), *words])


def _token(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="launch.py token")
    parser.add_argument("name", help="how the log calls the caller")
    parser.add_argument("roles", nargs="*", default=["infer"], help="infer, train, admin (default: infer)")
    options = parser.parse_args(words)
    from cluster.gateway.auth import new_token

    token, entry = new_token(options.name, options.roles)
    print(f"token, shown this once: {token}", file=sys.stderr)
    print(entry, end="")
    return 0


def _method(name: str, words: list[str], *, only_plan: bool = False, path: str = "") -> int:
    module = importlib.import_module(path or f"methods.{name}")
    parser = argparse.ArgumentParser(prog=f"launch.py {name}", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", type=Path)
    options, overrides = parser.parse_known_args(words)
    if options.help:
        return _help(name, module)
    from cluster.configure import configure, run_name

    config = configure(module.Config, overrides, options.config, getattr(module, "preset", None))
    if only_plan or not os.environ.get("RAY_ADDRESS"):
        # A cluster that is there may grow; what is too much for this machine alone is refused before it starts.
        _plan(module, config, show=only_plan)
    if only_plan:
        return 0
    return _run(name, module, config, run_name(name, config))


def _plan(module: ModuleType, config: "MethodConfig", *, show: bool) -> None:
    from cluster.plan import check, nodes, plan, table

    policies = module.policies(config) if hasattr(module, "policies") else {}
    placed = plan(config, policies, nodes(config))
    if show:
        print(table(placed))
    check(placed)


def _help(name: str, module: ModuleType) -> int:
    from cluster.configure import describe

    print(f"{module.__doc__}\nusage: launch.py {name} [--config FILE] [key=value ...]\n")
    if hasattr(module, "preset"):
        print(f"{inspect.getdoc(module.preset)}\n")
    for key, kind, default, meaning in describe(module.Config):
        print(f"{key}  {kind}  = {default}")
        print(f"    {meaning}")
    return 0


def _run(name: str, module: ModuleType, config: "MethodConfig", run: str) -> int:
    """Run a method to its end, or until Ctrl-C or SIGTERM."""
    from cluster.cluster import Cluster

    cluster = Cluster(config, method=name, run=run, headline=getattr(module, "HEADLINE", ()))
    try:
        return asyncio.run(_in_cluster(cluster, module))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except asyncio.CancelledError:
        code = 128 + signal.SIGTERM
    if name == "serve":
        print("stopped", file=sys.stderr)
        return 0
    latest = cluster.directory.latest()
    where = f"continues after {latest.name}" if latest else "begins anew, nothing is committed yet"
    print(f"stopped; the same command {where}", file=sys.stderr)
    return code


async def _in_cluster(cluster: "Cluster", module: ModuleType) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with cluster:
        await module.run(cluster, cluster.config)
        finished = cluster.finished()
    _conclude(cluster.directory.path, finished)
    return ENDED_EARLY if finished else 0


def _conclude(folder: Path, finished: str) -> None:
    """Print the result of a run and where its report is."""
    from cluster.report import write_report
    from cluster.summary import show_summary

    show_summary(folder)
    if finished:
        print(f"the run ended itself: {finished}", file=sys.stderr)
    print(f"run:    {_relative(folder)}\nreport: {_relative(write_report(folder))}")


def _relative(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return os.fspath(path)


if __name__ == "__main__":
    sys.exit(main())
