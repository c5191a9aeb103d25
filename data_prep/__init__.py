"""Any detection data set to verified shards, and shards to batches.

This room imports no other room. A map of its modules, first what flows, then the way that it takes:

Fetching: COCO's servers → the images and annotations of COCO 2017 in a folder.
    `fetch` → `download` an archive → `unpack` it
Annotations: files of COCO, VOC or YOLO, and images → a checked `DetectionDataset`.
    `formats` → `coco_format`, `voc_format` or `yolo_format`, of which the last two list images
    (`image_list`), read class names (`class_list`) and sizes (`image_header`) → `assemble`, by the
    rules in `checks` → `records`; what is wrong goes to `findings`
Shards: a data set → tars of samples, `manifest.json` and `report.json`, all of them or nothing.
    `shard` → `parallel`, over the processes of `pool` → `tar_writer`, in the form of `samples` →
    `journal`, for a run that is ended, and `manifest` → `publish` in a folder, `upload` to a URL
Verifying: a folder of shards → sentences about what is not as its manifest has it.
    `verify`, over the processes of `pool` → `verify_shard`
Reading: shards here or at a URL → a sample by its position, decoded.
    `remote` → `cache`, for a URL → `source` → `reader` → `decode`
Stream: samples → batches of a rank, the same whatever the ranks and workers.
    `order` of the epoch → `stream`, with `augment` → composed by `workers`, who hand pixels over in
    the `ring`, or on the training `device` → `loader` → `batch`; `validation` goes once over every
    picture; `quarantine` counts the samples that could not be used

A user's mistake is one of `errors`, everywhere.
"""
