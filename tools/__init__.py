"""Tools around the models: data sets made and checked (prepare, toy), pictures (draw), a run as a page (report)."""
