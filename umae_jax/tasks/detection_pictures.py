"""Pictures of detections, in validations and for images without annotations."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from umae_jax.annotated import draw_instances, draw_sheet, encode_png
from umae_jax.console import duration, say, warn
from umae_jax.data.annotations import AnnotatedSource, without_annotations
from umae_jax.data.decode import EncodedImage
from umae_jax.data.sources import open_images
from umae_jax.detection.coco import paste
from umae_jax.errors import UserError, printable, require
from umae_jax.files import AnyPath, write_atomic
from umae_jax.multihost import is_primary
from umae_jax.tasks.detecting import Finder, Found
from umae_jax.training.task import Prediction
from umae_jax.weights.stored_run import StoredRun

MIN_SCORE = 0.3  # of a detection that is drawn
