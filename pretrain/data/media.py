"""What files are by the ending of their names, and the pixel statistics that published networks were trained with."""

#: Last part of a member's name that makes its sample a video sample, and a file a video: what FFmpeg demuxes.
VIDEO_ENDINGS = frozenset("mp4 m4v mov avi mkv webm mpg mpeg vob ts mts m2ts wmv flv ogv 3gp".split())
#: Name's last part of a member that holds a video's path or URL in the place of the video (pack.py --in-place).
LINK_ENDING = "link"
#: Of one beside it that tells what of that video is meant, and where in the file it lies.
SPAN_ENDING = "span"

#: ImageNet statistics of pixels in [0, 1], RGB.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
