"""Embeds on a Spark cluster whose hosts see the same paths: spark-submit spark_recipe.py IMAGES BACKBONE CACHE"""

import sys
from pathlib import Path

from pyspark.sql import SparkSession

images, backbone, cache = sys.argv[1:]
num_shares = 4  # partitions; one that dies is tried again by Spark, and goes on where it stopped


def embed_share(index: int) -> int:
    import probe  # on the executor

    config = probe.EmbedConfig(
        images=Path(images), backbone=backbone, out=Path(cache), shard_index=index, num_shards=num_shares
    )
    return probe.embed_images(config)["num_computed"]


context = SparkSession.builder.appName("probe embed").getOrCreate().sparkContext
print(sum(context.parallelize(range(num_shares), num_shares).map(embed_share).collect()), "images were computed")
