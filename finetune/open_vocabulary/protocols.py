"""The eleven sets that open-vocabulary segmentation is judged on: class names, values of masks, background.

As in GroupViT's, TCL's and TagAlign's evaluation (systems/tagalign.md, section 7): one metric for all, mIoU over the
classes of a set. Names are those of mmsegmentation's data sets. ImageNet-S's are not here: they come from a file.
"""

from dataclasses import dataclass

VOC = """aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep sofa
train monitor"""
CONTEXT = """aeroplane,bag,bed,bedclothes,bench,bicycle,bird,boat,book,bottle,building,bus,cabinet,car,cat,ceiling,
chair,cloth,computer,cow,cup,curtain,dog,door,fence,floor,flower,food,grass,ground,horse,keyboard,light,motorbike,mountain,
mouse,person,plate,platform,pottedplant,road,rock,sheep,shelves,sidewalk,sign,sky,snow,sofa,table,track,train,tree,
truck,tvmonitor,wall,water,window,wood"""
THINGS = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,
wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"""
STUFF = """banner,blanket,branch,bridge,building,bush,cabinet,cage,cardboard,carpet,ceiling,tile ceiling,cloth,clothes,
clouds,counter,cupboard,curtain,desk,dirt,door,fence,marble floor,floor,stone floor,tile floor,wood floor,flower,fog,
food,fruit,furniture,grass,gravel,ground,hill,house,leaves,light,mat,metal,mirror,moss,mountain,mud,napkin,net,paper,
pavement,pillow,plant,plastic,platform,playing field,railing,railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,
sky,skyscraper,snow,solid,stairs,stone,straw,structural,table,tent,textile,towel,tree,vegetable,brick wall,
concrete wall,wall,panel wall,stone wall,tile wall,wood wall,water,waterdrops,blind window,window,wood"""
CITYSCAPES = """road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,
car,truck,bus,train,motorcycle,bicycle"""
ADE = """wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,table,
mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,rock,
wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,skyscraper,
fireplace,refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,bookcase,
blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,swivel chair,boat,bar,
arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,television receiver,airplane,
dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,van,ship,fountain,conveyer belt,
canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,minibike,cradle,oven,ball,food,step,tank,
trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,
ashcan,fan,pier,crt screen,plate,monitor,bulletin board,shower,radiator,glass,clock,flag"""


@dataclass(frozen=True)
class SetProtocol:
    """How a set is judged.

    Attributes:
        what: set and half.
        names: of the classes, without the background; None: a file has them.
        count: classes without the background.
        background: whether pixels of none of the classes are a class of their own, found by a threshold.
        first_class: value in masks of the first class that counts, the background's where there is one.
        ignored: value in masks that counts nowhere.
        masks: which files the masks are.
    """

    what: str
    names: tuple[str, ...] | None
    count: int
    background: bool
    first_class: int = 0
    ignored: int = 255
    masks: str = ""


def _names(text: str) -> tuple[str, ...]:
    """Split a list of names, at commas where it has some."""
    parts = text.split(",") if "," in text else text.split()
    return tuple(" ".join(part.split()) for part in parts)


_COCO_STUFF = (*_names(THINGS), *_names(STUFF))
_IMAGENET_S = "16-bit PNG of red + 256 green of the released masks; 0 other, 1000 ignored"

PROTOCOLS = {
    "voc": SetProtocol("PASCAL VOC 2012 val", _names(VOC), 20, True, masks="SegmentationClass"),
    "context": SetProtocol("PASCAL Context val", _names(CONTEXT), 59, True, masks="SegmentationClassContext"),
    "coco_object": SetProtocol("COCO val2017, objects", _names(THINGS), 80, True, masks="instances; 0 background"),
    "imagenets50": SetProtocol("ImageNet-S 50 validation", None, 50, True, ignored=1000, masks=_IMAGENET_S),
    "imagenets300": SetProtocol("ImageNet-S 300 validation", None, 300, True, ignored=1000, masks=_IMAGENET_S),
    "imagenets919": SetProtocol("ImageNet-S 919 validation", None, 919, True, ignored=1000, masks=_IMAGENET_S),
    "voc20": SetProtocol("PASCAL VOC 2012 val, no background", _names(VOC), 20, False, 1, masks="SegmentationClass"),
    "context59": SetProtocol(
        "PASCAL Context val, no background", _names(CONTEXT), 59, False, 1, masks="SegmentationClassContext"
    ),
    "coco_stuff": SetProtocol("COCO-Stuff 164k val", _COCO_STUFF, 171, False, masks="labelTrainIds"),
    "cityscapes": SetProtocol("Cityscapes val", _names(CITYSCAPES), 19, False, masks="labelTrainIds"),
    "ade20k": SetProtocol("ADE20K validation", _names(ADE), 150, False, 1, masks="annotations; 0 counts nowhere"),
}
