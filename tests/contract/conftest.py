from tests.stores import az, no_cloud, s3, server, store_uri

__all__ = ["az", "no_cloud", "s3", "server", "store_uri"]
