"""What makes an assistant of a pretrained model: answers, adapters, preferences."""
