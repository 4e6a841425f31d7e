"""A whole Kubernetes cluster on loopback: Kubernetes' own programs, one real node, RBAC on. Tests and people use it alike."""
