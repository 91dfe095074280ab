"""Does CA-Stream improve saliency? An ImageNet network, 200 classes, paired differences, several seeds."""
