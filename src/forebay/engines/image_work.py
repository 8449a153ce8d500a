"""Makes images that strangers sent ready for a model, and puts what it painted back, each in a forked, limited child.

It answers with bare pixels and with files that our own encoder has written, or with the reason why there is none; it opens
no address and no file, and no image is decoded in the process that talks to the server.

Standard input is a socket. An order on it is `>I`, the length of its head, sent with its descriptors, and then the head as
JSON. Each answer is `>BI`, verdict and length, and facts as JSON. Limits come as JSON in the first argument (`Settings`).

`{"order": "prepare", "images": count, "mask": bool, "needs_mask": bool, "edge_max", "edge_factor", "mask_plan": {"mode",
"specks", "dilation", "feather"}, "output": {"format", "compression", "backdrop", "size": [width, height] or null}}` comes
with the descriptors of the images, of the mask if there is one, and of an empty file that can be written. Into that go the
images as RGB, the first in the size that is to be painted, and then the mask, if there is any: 255 where it is to be
painted. Facts: `{"size": [width, height], "images": [[width, height]...], "mask": bool}`.

`{"order": "finish", "images": 0 or 1, "mask", "needs_mask", "mask_plan", "output", "painted": [width, height], "preview":
bool}` comes with the descriptors of the first image, of the mask, of what was painted as RGB, and of an empty file. Into that
go the encoded picture and, if it is wanted, a preview (JPEG). Facts: `{"size": [width, height], "picture": bytes,
"preview": bytes}`. With no image at all, it is what was painted.

Without a mask of its own an image that `needs_mask` is edited where one can see through it, and else it is the engine's as a
whole. Facts of a refusal: `{"file": "image", "number": count from 0}` or `{"file": "mask"}`, or nothing. The verdicts:

0  OK
1  NOT_AN_IMAGE     no PNG, JPEG or WebP
2  BROKEN           damaged
3  TOO_MANY_PIXELS  above `pixels_max`, by its header
4  TOO_MANY_FRAMES  an animation
5  TOO_COSTLY       too much time or memory
6  TOO_NARROW       above `ratio_max`
7  NO_MASK          one is needed: none was sent, and nothing of the first image is transparent
8  MASK_SIZE        the mask has another size than the first image (both upright); facts have both: `"sizes": [[w, h], [w, h]]`
9  MASK_NO_ALPHA    in mode `alpha`: nothing of it can be transparent (send it with mask_mode=white)
10 MASK_EMPTY       nothing of it is transparent, or white
11 MASK_TOO_SMALL   fewer than `mask_pixels_min` pixels once it is cleaned up; facts: `"pixels"`
12 MASK_TOO_LARGE   covers more than `mask_coverage_max` of the image; facts: `"coverage"` 0 to 1
13 OTHER_SHAPE      `output.size` has another ratio of its sides than the first image
14 TOO_LONG_SIDE    the format cannot hold a side that long (WebP 16,383, JPEG 65,500)
15 NO_ROOM          the disk is full
"""
