"""Object detection and instance segmentation with cocktailsdk, in the manner of Detectron2."""
