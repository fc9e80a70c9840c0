"""A server that answers as Google Cloud Storage does, with one bucket, "bucket", in memory: `python FILE PORT`.

The emulator's answer to a download lacks its generation, without which TensorStore takes no file; and what it has not
got, moving an object, it calls a failure of its own, which is tried again and again.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

download = objects.download


def download_with_generation(request, response, storage, *arguments, **options):
    download(request, response, storage, *arguments, **options)
    if response.status < 300:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]


def refuse(request, response, storage):
    response.status = HTTPStatus.FORBIDDEN


objects.download = download_with_generation
server.HANDLERS = ((r".*/moveTo/.*", {"POST": refuse}), *server.HANDLERS)
server.create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
