"""Model -> Dynamo's graph -> pre-dispatch ATen."""
