"""A hash of weights, exact to the last bit."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def weights_digest(state: dict[str, Tensor]) -> str:
    """A hash of names and exact values; unlike ``checkpoint.fingerprint`` it sees the last bit."""

    def of_one(item: tuple[str, Tensor]) -> bytes:
        name, value = item
        values = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        head = f"{name} {value.dtype} {tuple(value.shape)}".encode()
        return hashlib.blake2b(values, digest_size=16, key=hashlib.blake2b(head).digest()).digest()

    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        return hashlib.blake2b(b"".join(pool.map(of_one, sorted(state.items()))), digest_size=16).hexdigest()
