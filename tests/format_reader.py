"""A reader of format v1 that knows nothing of kdcache: written from FORMAT.md alone, on zarr, numpy and the standard library.

`read_cache(folder)` checks every digest up to the root and gives all that the cache holds. Where FORMAT.md leaves a reader in doubt, mend it there.
"""

import hashlib
import json

import numpy as np
import zarr


def digest(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def checked(path, file):
    data = path.read_bytes()
    assert len(data) == file["size"] and digest(data) == file["digest"], f"{path} was changed"
    return data


def document(path):  # FORMAT.md §2
    data = path.read_bytes()
    body = json.loads(data)
    assert body["format"] == "kdcache" and body["version"] == 1, f"{path} is of version {body['version']}"
    assert data[:19] == b'{\n "file_digest": "' and digest(data[:19] + b"0" * 32 + data[51:]) == body["file_digest"], f"{path} was changed"
    assert digest(canonical(body["identity"])) == body["identity_digest"]
    if group := body["identity"].get("group"):
        assert digest(canonical(group["files"])) == group["digest"] and group["name"].split(".")[-2] == group["digest"][:12]
        contents = [checked(path.parent / group["name"] / name, file) for name, file in group["files"].items()]
        assert len(contents) == sum(one.is_file() for one in (path.parent / group["name"]).rglob("*"))
    return body["identity"] | {"digest": body["identity_digest"], "path": path}


def tensors(data):  # a safetensors file
    start = 8 + int.from_bytes(data[:8], "little")
    places = {name: one for name, one in json.loads(data[8:start]).items() if name != "__metadata__"}
    parts = {name: data[start:][slice(*one["data_offsets"])] for name, one in places.items()}
    return {name: np.frombuffer(part, {"F32": "<f4"}[places[name]["dtype"]]).reshape(places[name]["shape"]) for name, part in parts.items()}


def dct_matrix(n):
    k, i = np.arange(n)[:, None], np.arange(n)
    return np.sqrt((2 - (k == 0)) / n) * np.cos(np.pi * (i + 0.5) * k / n)


def decode(card, part, stats):  # §4: components (rows, …) → {"logits": (rows, K)}, or {"grid": (rows, T, C)[, "prefix": (rows, P, C)]}
    name, argument = (card["encoding"] + "=").split("=")[:2]
    wide = {key: value.astype("f8" if value.dtype.kind == "f" else "i8") for key, value in part.items()}
    if name == "dense":
        return {"logits": wide["range"][:, :1] + wide["codes"] * wide["range"][:, 1:]}
    if name == "topk":
        ranked = wide["top"][:, None] - np.cumsum(np.pad(wide["gaps"][:, : int(argument) - 1], ((0, 0), (1, 0))), axis=1)
        kept = np.concatenate([ranked, ranked[:, -1:] - wide["gaps"][:, int(argument) - 1 :]], axis=1)
        logits = np.repeat(kept[:, -1:], card["num_classes"], axis=1)
        np.put_along_axis(logits, wide["index"], kept[:, : wide["index"].shape[1]], axis=1)
        return {"logits": logits / 256}
    if name in ("fp16", "bf16"):
        return {key: value if name == "fp16" else (value.astype("<u4") << 16).view("<f4") for key, value in part.items()}
    z = {key: wide[key] * wide[f"{key}_scale"][..., None] for key in wide if f"{key}_scale" in wide and (name, key) != ("klt", "grid")}
    if name == "klt":
        codes = (wide["grid"] >> 1) ^ -(wide["grid"] & 1)
        z["grid"] = (codes.swapaxes(1, 2) * stats["step"] * wide["grid_scale"][..., None]) @ stats["basis"].T
    if name == "dct":
        (height, width), count = card["grid"], dict.fromkeys(("dc", "low", "mid", "high"), 0)
        y = np.zeros((len(z["dc"]), height, width, card["channels"]))
        for u, v in np.ndindex(height, width):
            rho, one = (u * width) ** 2 + (v * height) ** 2, (height * width) ** 2
            band = "dc" if rho == 0 else "low" if 16 * rho <= one else "mid" if 4 * rho <= one else "high"
            y[:, u, v] = z[band][:, count[band]]
            count[band] += 1
        z["grid"] = np.einsum("ui,nuvc,vj->nijc", dct_matrix(height), y, dct_matrix(width)).reshape(len(y), height * width, -1)
    return {key: stats[f"{key}_mean"] + stats[f"{key}_std"] * z[key] for key in ("grid", "prefix") if key in z}


def arrays_of(record):
    group = zarr.open_group(record["path"].parent / record["group"]["name"], mode="r")
    return {name: array[...] for name, array in group.members(None) if isinstance(array, zarr.Array)}


def read_cache(
    folder,
):  # {"root", "plan", "tails", "rows": {(shard, key, view): {"label", "params", "pixels", "stored", "<teacher> <target>[.prefix]"}}}
    rows, keys, seen, tails, cache = {}, {}, {}, {}, document(folder / "cache.json")
    root = {"cache": cache["digest"], "views": {}, "teachers": {}}
    for record in map(document, sorted(folder.glob("views/*.json"))):
        assert record["plan"] == digest(canonical(cache["plan"]))
        root["views"][f"views/{record['path'].name}"] = record["digest"]
        part, shard = arrays_of(record), record["shard"]
        ends = part["keys/ends"]
        keys[shard] = [part["keys/bytes"][start:end].tobytes().decode() for start, end in zip([0, *ends], ends, strict=False)]
        for place, view in enumerate(range(record["views"]["start"], record["views"]["stop"])):
            seen[shard, view] = digest(part["pixels"][place].tobytes())
            assert seen[shard, view] == record["pixels_by_view"][place]
            for row, key in enumerate(keys[shard]):
                stored = part["stored/bytes"][slice(*part["stored/span"][place, row])].tobytes()
                rows[shard, key, view] = {"label": part["labels"][row], "stored": stored} | {
                    one: part[one][place, row] for one in ("params", "pixels")
                }
    for path in folder.glob("teachers/*"):
        teacher, cards = document(path / "teacher.json"), {card["name"]: card for card in map(document, path.glob("targets/*.json"))}
        root["teachers"][path.name] = entry = {"teacher": teacher["digest"], "targets": {}, "records": {}}
        entry["targets"] = {name: card["digest"] for name, card in cards.items()}
        files = {name: (f"targets/{name}.calibration.safetensors", card["calibration"]) for name, card in cards.items() if "calibration" in card}
        stats = {name: tensors(checked(path / file, field)) for name, (file, field) in files.items()}
        if (path / "tail.json").exists():
            tail = document(path / "tail.json")
            entry["tail"], tails[path.name] = tail["digest"], tensors(checked(path / "tail.safetensors", tail["weights"]))
        for record in map(document, sorted({*path.glob("*.json")} - {path / "teacher.json", path / "tail.json"})):
            views, shard, part = range(record["views"]["start"], record["views"]["stop"]), record["shard"], arrays_of(record)
            entry["records"][f"teachers/{path.name}/{record['path'].name}"] = record["digest"]
            assert record["teacher"] == teacher["digest"] and all(entry["targets"][name] == one for name, one in record["targets"].items())
            assert record["pixels"] == digest(canonical({str(view): seen[shard, view] for view in views}))
            for place, view, name in ((place, view, name) for place, view in enumerate(views) for name in record["targets"]):
                components = {one.split("/")[1]: array[place] for one, array in part.items() if one.startswith(f"{name}/")}
                for key, values in decode(cards[name], components, stats.get(name)).items():
                    for row, value in zip(keys[shard], values, strict=True):
                        rows[shard, row, view][f"{path.name} {name}" + ".prefix" * (key == "prefix")] = value
    return {"root": digest(canonical(root)), "plan": cache["plan"], "tails": tails, "rows": rows}
