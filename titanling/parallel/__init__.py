"""How ranks share the work: degrees, mesh, and the plans laid over a model."""
