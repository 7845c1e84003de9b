"""The commands of `commands.py` under every fault: the exit code, one line about the error, no incomplete file, and
afterwards the result of an undisturbed run.

CI runs each fault on one command of each group, `make test-faults` on all commands; docs/faults.md has the results.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.commands import COMMANDS, Command
from tests.faults.faulty_run import FaultInputs, FaultyRun, Outcome, wait
from tests.faults.file_check import check_complete

pytestmark = pytest.mark.slow

# CI always kills at the same moments, so that a new failure is due to a change; the whole matrix draws new ones.
SEED = int(
    os.environ.get("LAVIC_FAULTS_SEED")
    or (random.SystemRandom().randrange(10**6) if os.environ.get("LAVIC_ALL_FAULTS") else 1)
)
MOMENTS = 4
"""Number of kills, and of sizes of a full disk, for each command in the whole matrix."""
ODD = "a b#c%20d?é"


def check_refused(run: FaultyRun, outcome: Outcome, code: int) -> None:
    """The command has printed one line about the error, and nothing after it."""
    assert "Traceback" not in outcome.stderr, outcome.stderr
    assert outcome.code == code, f"{outcome.code}\n{outcome.stdout}{outcome.stderr}"
    assert len(outcome.errors) == 1, outcome.stderr
    assert outcome.stderr.splitlines()[-1] == outcome.errors[0], outcome.stderr
    assert outcome.errors[0].startswith(f"lavic {run.argv[0]}: error: ")


def check_undisturbed(inputs: FaultInputs, run: FaultyRun, outcome: Outcome) -> None:
    """The command has ended as a run without a fault does, with the same result."""
    expected = inputs.undisturbed(run.command)
    assert "Traceback" not in outcome.stderr and not outcome.errors, outcome.stderr
    assert outcome.code == expected.code, f"{outcome.code}\n{outcome.stdout}{outcome.stderr}"
    if run.command.prints:
        assert run.printed(outcome) == expected.stdout
    assert run.command.signature(run.folder) == expected.signature


def read_only(inputs: FaultInputs, run: FaultyRun) -> None:
    before = run.command.signature(run.folder) if run.command.result is None else {}
    with run.read_only():
        outcome = run.run()
    if run.command.prints:
        check_undisturbed(inputs, run, outcome)
        return
    check_refused(run, outcome, 2)
    if run.command.result is None:
        assert run.command.signature(run.folder) == before


def disk_full(inputs: FaultInputs, run: FaultyRun, share: float = 0.0) -> None:
    if run.command.prints:
        check_refused(run, run.run(stdout=Path("/dev/full")), 1)
        return
    with run.small_disk(int(share * inputs.undisturbed(run.command).blocks)):
        outcome = run.run()
    check_refused(run, outcome, 1)
    check_complete(run.out)
    check_undisturbed(inputs, run, run.run())


def unreadable(inputs: FaultInputs, run: FaultyRun, pattern: str) -> None:
    first_file(run, pattern).chmod(0)
    check_damaged_input(run, run.run_obeying_modes(), "input unreadable", pattern)


def cut(inputs: FaultInputs, run: FaultyRun, pattern: str) -> None:
    file = first_file(run, pattern)
    os.truncate(file, file.stat().st_size // 2)
    check_damaged_input(run, run.run(), "input cut", pattern)


def check_damaged_input(run: FaultyRun, outcome: Outcome, fault: str, pattern: str) -> None:
    """The command has refused the input and left no files, or has printed what is expected of it."""
    code, message = run.command.tolerates.get((fault, pattern), (2, ""))
    if message:
        assert outcome.code == code and message in outcome.stdout + outcome.stderr, outcome.stdout + outcome.stderr
        assert "Traceback" not in outcome.stderr and not outcome.errors, outcome.stderr
        return
    check_refused(run, outcome, code)
    if run.command.keeps_work and fault == "input cut":
        assert {path.name for folder in run.out.iterdir() for path in folder.iterdir()} <= {"work", ".lock"}
    elif not run.command.copies:
        assert not list(run.out.iterdir())


def killed(inputs: FaultInputs, run: FaultyRun, share: float = 0.0) -> None:
    changes = inputs.undisturbed(run.command).changes
    if not changes:  # it writes nothing: kill it at any time
        process = run.start()
        process.kill()
        assert wait(process).code == -9
    else:
        outcome, _ = run.run_killed(1 + int(share * changes))
        # A run may make fewer changes than the one that was counted, and end before its moment.
        assert outcome.code in (-9, inputs.undisturbed(run.command).code), outcome.stderr
    check_complete(run.out)
    check_undisturbed(inputs, run, run.run())


def twice(inputs: FaultInputs, run: FaultyRun) -> None:
    outcomes = [wait(process) for process in [run.start(), run.start()]]
    locked_out = [outcome for outcome in outcomes if outcome.code == 2 and not run.command.prints]
    assert len(locked_out) < 2, [outcome.stderr for outcome in outcomes]
    for outcome in outcomes:
        if outcome in locked_out:
            check_refused(run, outcome, 2)
        else:
            check_undisturbed(inputs, run, outcome)


def no_home(inputs: FaultInputs, run: FaultyRun) -> None:
    outcome = run.run_without_home()
    if run.command.name == "doctor":  # it reports what is missing
        assert outcome.code == 1 and "HOME" in outcome.stdout and not outcome.stderr, outcome.stdout + outcome.stderr
    else:
        check_undisturbed(inputs, run, outcome)


def c_locale(inputs: FaultInputs, run: FaultyRun) -> None:
    env = {key: value for key, value in run.env.items() if key != "LANG"}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    check_undisturbed(inputs, run, run.run_interpreter(env=env))


def odd_path(inputs: FaultInputs, run: FaultyRun) -> None:
    check_undisturbed(inputs, run, run.run())


def first_file(run: FaultyRun, pattern: str) -> Path:
    """The first file that matches a pattern."""
    return sorted(run.folder.glob(pattern))[0]


FAULTS: dict[str, Callable[..., None]] = {
    "OUT read-only": read_only,
    "disk full": disk_full,
    "input unreadable": unreadable,
    "input cut": cut,
    "killed": killed,
    "run twice at once": twice,
    "no HOME": no_home,
    "C locale": c_locale,
    "odd path": odd_path,
}


def rows(command: Command, fault: str) -> list[tuple[object, ...]]:
    """The variants of a fault for a command: inputs, disk sizes or moments."""
    if fault in ("input unreadable", "input cut"):
        return [(pattern,) for pattern in command.reads]
    if fault in ("disk full", "killed") and not command.prints:
        generator = random.Random(f"{SEED} {command.name} {fault}")
        return [((number + generator.random()) / MOMENTS,) for number in range(MOMENTS)]
    return [()]


def parameters(everything: bool) -> Iterator[object]:
    """Rows of the matrix: all, or one for each fault and each group of commands."""
    groups: dict[str, list[Command]] = {}
    for command in COMMANDS.values():
        groups.setdefault(command.group, []).append(command)
    for number, fault in enumerate(FAULTS):
        for group in groups.values():
            commands = [command for command in group if rows(command, fault)]
            for command in commands if everything else [commands[number % len(commands)]]:
                variants = rows(command, fault)
                for variant in variants if everything else [variants[SEED % len(variants)]]:
                    label = f"{command.name}-{fault}" + "".join(
                        f"-{value:.2f}" if isinstance(value, float) else f"-{Path(str(value)).name}"
                        for value in variant
                    )
                    yield pytest.param(command, fault, variant, id=label.replace(" ", "_"))


@pytest.mark.parametrize(("command", "fault", "variant"), parameters(bool(os.environ.get("LAVIC_ALL_FAULTS"))))
def test_fault(
    inputs: FaultInputs,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    command: Command,
    fault: str,
    variant: tuple[object, ...],
) -> None:
    record_property("command", command.name)
    record_property("fault", fault)
    print(f"LAVIC_FAULTS_SEED={SEED}")
    run = inputs.prepare(command, tmp_path / (ODD if fault == "odd path" else "here"))
    FAULTS[fault](inputs, run, *variant)
