"""What trackers have written, read back without them: wandb's file of an offline run, MLflow's file store."""

import json
import struct

BLOCK = 32768  # of LevelDB's log format, which wandb's files are in
HEAD = struct.Struct(
    "<IHB"
)  # checksum, length, and whether it is whole (1), a first (2), middle or last (4) part


def wandb_records(folder, kind):
    """The records of one kind that the offline runs in ``folder`` hold, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        contents, place, body = file.read_bytes(), 7, b""
        while place + HEAD.size <= len(contents):
            if BLOCK - place % BLOCK < HEAD.size:
                place += BLOCK - place % BLOCK
                continue
            _, length, part = HEAD.unpack_from(contents, place)
            place += HEAD.size + length
            body = (body if part > 2 else b"") + contents[place - length : place]
            if part in (1, 4):
                record = Record()
                record.ParseFromString(body)
                found.append(record)
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def wandb_config(folder):
    """The settings of the offline runs in ``folder``."""
    updates = [item for record in wandb_records(folder, "config") for item in record.update]
    return {item.key: json.loads(item.value_json) for item in updates}


def wandb_history(folder, name, axis):
    """The values under ``name``, by those under ``axis``."""
    rows = [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.item}
        for record in wandb_records(folder, "history")
    ]
    return {int(row[axis]): float(row[name]) for row in rows if name in row}


def mlflow_runs(store):
    """The folders of the runs in a file store."""
    return sorted(path.parent for path in store.glob("*/*/meta.yaml"))


def mlflow_metric(run, name):
    """The values of a metric by step, from its file: lines of time, value, step."""
    lines = [line.split() for line in (run / "metrics" / name).read_text().splitlines()]
    return {int(step): float(value) for _, value, step in lines}
