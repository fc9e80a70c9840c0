"""A server that emulates Google Cloud Storage, with one bucket, "bucket", in memory: `python FILE PORT`.

It corrects the emulator: a download states its generation, which TensorStore requires; and moving an object, which the
emulator lacks, is forbidden instead of failing with an error that gcsfs retries.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

download = objects.download


def download_with_generation(request, response, storage, *arguments, **options):
    download(request, response, storage, *arguments, **options)
    if response.status < 300:
        stored = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = stored["generation"]


def refuse(request, response, storage):
    response.status = HTTPStatus.FORBIDDEN


objects.download = download_with_generation
server.HANDLERS = ((r".*/moveTo/.*", {"POST": refuse}), *server.HANDLERS)
server.create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
