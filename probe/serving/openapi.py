"""What the endpoint takes and gives, as OpenAPI describes it."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

REASONS = (
    "empty", "format", "truncated", "corrupt", "too-big", "aspect", "depth", "memory", "timeout", "crashed",
)  # fmt: skip


def describe_endpoint(class_names: Sequence[str], *, multi_label: bool, max_bytes: int) -> dict[str, Any]:
    """The OpenAPI 3.1 document of one classifier."""
    name = {"type": "string", "enum": list(class_names)}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    image = {"type": "string", "format": "binary", "description": f"An image file of at most {max_bytes:,} bytes."}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "probe serve",
            "version": importlib.metadata.version("probe-jax"),
            "description": "Classifies images. Requests that arrive together are answered in one step of the device.",
        },
        "paths": {
            "/predict": {
                "post": {
                    "operationId": "predict",
                    "summary": "Classify one image",
                    "parameters": [
                        {
                            "name": "thumbnails",
                            "in": "query",
                            "description": "Whether the nearest training images come with a picture.",
                            "schema": {"type": "boolean", "default": False},
                        }
                    ],
                    "requestBody": {
                        "required": True,
                        "description": "The file itself, or a form with one file.",
                        "content": {
                            "image/*": {"schema": image},
                            "application/octet-stream": {"schema": image},
                            "multipart/form-data": {
                                "schema": {"type": "object", "required": ["image"], "properties": {"image": image}}
                            },
                        },
                    },
                    "responses": {
                        "200": {
                            "description": "The answer.",
                            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Prediction"}}},
                        },
                        "400": {"description": "A form without a file, with several, or damaged.", "content": error},
                        "403": {"description": "Asked by the page of another site.", "content": error},
                        "408": {"description": "The request was not all there in time.", "content": error},
                        "413": {"description": f"More than {max_bytes:,} bytes.", "content": error},
                        "421": {"description": "The Host header names another machine.", "content": error},
                        "422": {"description": "An image that cannot be read; the reason says why.", "content": error},
                        "503": {
                            "description": "As many images are under way as may be.",
                            "headers": {
                                "Retry-After": {
                                    "description": "Seconds until there is likely to be place.",
                                    "schema": {"type": "integer", "minimum": 1},
                                }
                            },
                            "content": error,
                        },
                    },
                }
            }
        },
        "components": {
            "schemas": {
                "Prediction": {
                    "type": "object",
                    "required": ["predicted", "probabilities", "trained_on", "nearest"],
                    "additionalProperties": False,
                    "properties": {
                        "predicted": {
                            "type": "array",
                            "items": name,
                            "description": "The classes of a probability of one half or more.",
                        }
                        if multi_label
                        else {**name, "description": "The class of the highest probability."},
                        "probabilities": {
                            "type": "object",
                            "description": "Of each class; each stands alone." if multi_label else "Of each class.",
                            "required": list(class_names),
                            "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1},
                        },
                        "trained_on": {
                            "type": "boolean",
                            "description": "Whether the classifier was trained or chosen on this very file.",
                        },
                        "nearest": {
                            "type": "array",
                            "description": "The nearest training images, the nearest first.",
                            "items": {"$ref": "#/components/schemas/Neighbour"},
                        },
                    },
                },
                "Neighbour": {
                    "type": "object",
                    "required": ["path", "labels", "cosine", "thumbnail"],
                    "additionalProperties": False,
                    "properties": {
                        "path": {"type": "string", "description": "Its name below the folder of images."},
                        "labels": {"type": "array", "items": {"type": "string"}},
                        "cosine": {
                            "type": "number",
                            "minimum": -1,
                            "maximum": 1,
                            "description": "Of embeddings without the training images' mean; 1 is the same.",
                        },
                        "thumbnail": {
                            "type": ["string", "null"],
                            "description": "A data URI, if asked for and if the image is still what it was.",
                        },
                    },
                },
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["reason", "detail"],
                            "properties": {
                                "reason": {
                                    "type": "string",
                                    "description": "A short code; of images that cannot be read: " + ", ".join(REASONS),
                                },
                                "detail": {"type": "string", "description": "The same for people."},
                            },
                        }
                    },
                },
            }
        },
    }
