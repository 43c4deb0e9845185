"""The steps of the pipelines as Kubeflow components, one folder a step; each only maps onto `salun_core.steps`."""
