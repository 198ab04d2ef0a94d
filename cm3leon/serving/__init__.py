"""The model over HTTP: the app, its queue and page; and the model as an MLflow pyfunc."""
