"""A gcloud of queued resources and buckets, run as a program: its machines are folders, and run what they are told.

The folder $FAKE_GCLOUD holds play.json, what it shall play, and receives calls (a line a call) and machines:
  states        of each request in turn, its states at each look; the last one stays
  errors        verb -> list of messages, one a call; "" is none
  seconds       verb -> how long an answer takes
  hosts         of a request
  lingers       how many looks a deleted request is DELETING
"""

import json
import os
import pathlib
import signal
import sys
import time

FOLDER = pathlib.Path(os.environ["FAKE_GCLOUD"])
PLAY = json.loads((FOLDER / "play.json").read_text())


def count(name: str) -> int:
    """Returns how often it was called with this name before."""
    path = FOLDER / f"count-{name}"
    number = int(path.read_text()) if path.exists() else 0
    path.write_text(str(number + 1))
    return number


def fail(message: str) -> None:
    sys.exit(f"ERROR: (gcloud.compute.tpus.queued-resources) {message}")


def machines() -> list[pathlib.Path]:
    return sorted(FOLDER.glob("machine*"))


def take_away() -> None:
    """Ends what runs on the machines, as when they lose power."""
    import shutil  # imports only where needed: this program starts often

    for machine in machines():
        for pid in machine.glob("*/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                pass
        shutil.rmtree(machine)


def create() -> None:
    if (FOLDER / "request").exists():
        fail("ALREADY_EXISTS: it exists")
    (FOLDER / "request").write_text(str(count("requests")))
    (FOLDER / "count-looks").unlink(missing_ok=True)
    for number in range(PLAY.get("hosts", 1)):
        (FOLDER / f"machine{number}").mkdir()


def describe() -> None:
    if (FOLDER / "deleting").exists():
        if count("lingering") < PLAY.get("lingers", 0):
            print(json.dumps({"state": {"state": "DELETING"}}))
            return
        (FOLDER / "deleting").unlink()
        (FOLDER / "request").unlink()
    if not (FOLDER / "request").exists():
        fail("NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/job' was not found")
    states = PLAY["states"][int((FOLDER / "request").read_text())]
    state = states[min(count("looks"), len(states) - 1)]
    if state in ("SUSPENDING", "SUSPENDED", "FAILED"):
        take_away()
    if state == "VANISHED":
        take_away()
        (FOLDER / "request").unlink()
        fail("NOT_FOUND: it was not found")
    detail = {"failedData": {"error": {"code": 8, "message": "There is no more capacity\nin the zone"}}}
    print(json.dumps({"name": "job", "state": {"state": state, **(detail if state == "FAILED" else {})}}))


def delete(words: list[str]) -> None:
    if not (FOLDER / "request").exists() or (FOLDER / "deleting").exists():
        fail("NOT_FOUND: it was not found")
    if "--force" not in words:
        fail("FAILED_PRECONDITION: it has nodes")
    take_away()
    (FOLDER / "deleting").touch()


def ssh(words: list[str]) -> None:
    import subprocess

    command = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    chosen = machines() if "--worker=all" in words else machines()[:1]
    if not chosen:
        fail("there is no machine to connect to")
    print("SSH: Attempting to connect to worker 0...", file=sys.stderr)
    running = []
    for machine in chosen:
        environment = {**os.environ, "HOME": str(machine), "MACHINE": machine.name}
        running.append(subprocess.Popen(["bash", "-c", command], cwd=machine, env=environment))
    codes = [process.wait() for process in running]
    sys.exit(next((code for code in codes if code), 0))


def copy(words: list[str]) -> None:
    import shutil

    for machine in machines():
        shutil.copy(words[0], machine / words[1].partition(":")[2])


def storage(words: list[str]) -> None:
    """A bucket is a folder in bucket/; one named "closed" can't be written."""
    path = FOLDER / "bucket" / words[-1].removeprefix("gs://")
    if "closed" in path.parts:
        sys.exit("ERROR: (gcloud.storage.cp) HTTPError 403: no permission to storage.objects.create")
    if words[0] == "cp":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sys.stdin.read())
    elif path.exists():
        print(path.read_text())
    else:
        sys.exit("ERROR: (gcloud.storage.cat) The following URLs matched no objects or files")


def main(words: list[str]) -> None:
    with open(FOLDER / "calls", "a") as file:
        print(json.dumps(words), file=file)
    if words[0] == "storage":
        storage(words[1:])
        return
    assert words[:3] == ["compute", "tpus", "queued-resources"], words
    verb = words[3]
    time.sleep(PLAY.get("seconds", {}).get(verb, 0))
    errors, number = PLAY.get("errors", {}).get(verb, []), count(f"verb-{verb}")
    if number < len(errors) and errors[number]:
        fail(errors[number])
    verbs = {"create": create, "describe": describe}
    about = {"delete": delete, "ssh": ssh, "scp": copy}
    if verb in verbs:
        verbs[verb]()
    else:
        about[verb](words[4:] if verb == "scp" else words[5:])


if __name__ == "__main__":
    main(sys.argv[1:])
