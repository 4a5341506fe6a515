"""Image data sets: what is in a path, told by its content, or by the name of a built-in set. Needs the `data` extra.

>>> from hopjax import data
>>> task1, task2 = data.class_split(data.read("cifar-10-batches-py"))  # doctest: +SKIP
>>> memories = task1.vectors()  # doctest: +SKIP

NumPy throughout; nothing here is imported by `import hopjax`, and the libraries that decode (pillow, pyarrow) are imported when they are
first needed. Files are not trusted: pickles are read without running them, and memory follows what a file holds, not what it claims.
"""

from hopjax.data.images import DataError, Images
from hopjax.data.recognition import RECOGNISED, read
from hopjax.data.samples import SAMPLES
from hopjax.data.tasks import LIVING, NON_LIVING, class_split, rotated

__all__ = ["LIVING", "NON_LIVING", "RECOGNISED", "SAMPLES", "DataError", "Images", "class_split", "read", "rotated"]
