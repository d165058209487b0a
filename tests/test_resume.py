"""Work is never lost: killed, stopped and broken runs go on to the same weights, byte for byte.

What may break, and what becomes of it. Every kind is a test, here or in the file named:

    state: weights cut short, empty, a flipped byte, missing, a pickle    the state before it, with a warning; the
    state: a pickle with its checksum right                               damaged one is put aside, never deleted
    state.json: empty, no JSON, binary, other JSON, no files, other step
    state: state.json missing, half-written .new folder of a dead run     does not count
    state: a file of the user's in it                                     is no concern
    state: of another stage, seed, configuration; names, shapes           refused, the difference named
    state: all of them damaged                                            refused; nothing starts anew
    run.json: empty, no JSON, other JSON, a lacking field, changed, gone  refused, the field named
    data: changed between stop and resume                                 refused
    cache: cut short, flipped, missing, JSON broken, ... (test_cache.py)  the part is made anew, with a warning
    disk full, folder not writable                                        an OSError that names the last whole state
    log.jsonl: last line half written                                     dropped
    --out a file, a finished run, another run, a checkpoint               refused
    config.json, model.safetensors: 40 kinds (test_checkpoint.py)         refused
"""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minimuse import checkpoint, cli, folders, train
from minimuse.cache import read_log if False else fingerprint  # noqa
