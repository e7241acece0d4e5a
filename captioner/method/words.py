"""The words of captions of photographs, by kind of fact: data for :mod:`captioner.method.kinds`.

A line is a family whose members exclude each other; ``/`` joins words that mean the same or too nearly \
the
same to be told apart in a photograph. The first word of each group is the one that others are swapped \
for.
"""

from __future__ import annotations

COLORS = """
red/crimson/scarlet/maroon/burgundy/reddish orange/peach/rust/coral \
yellow/golden/gold/mustard/blond/blonde green/olive/lime/greenish \
blue/navy/turquoise/teal/cyan/azure/bluish/indigo purple/violet/lavender/magenta/lilac \
pink/rosy/salmon/fuchsia brown/tan/beige/bronze/chestnut/khaki/copper black/dark white/cream/ivory/pale \
gray/grey/silver/silvery/charcoal
"""

# material and pattern
MATERIALS = """
wooden/wood metal/metallic/steel/iron/aluminum/chrome/brass/tin plastic/vinyl/rubber glass/crystal \
stone/marble/granite/concrete/cement/brick/tiled/cobblestone leather/suede \
fabric/cotton/woolen/wool/denim/linen/knitted/cloth/velvet/silk paper/cardboard \
ceramic/porcelain/clay/terracotta wicker/straw/bamboo/rattan
striped/pinstriped checkered/checked/plaid/tartan floral/flowered spotted/polka-dot/dotted
"""

# size and shape
SIZES = """
big/large/huge/giant/enormous/massive/oversized small/little/tiny/miniature
tall/high short/low
long short
wide/broad narrow
thick thin/slim/slender
round/circular/spherical square/rectangular/boxy triangular oval star-shaped heart-shaped
"""

COUNTS = "one two three four five six seven eight nine ten eleven twelve"
MANY = "several/multiple/many/numerous/dozens a single/just one/only one"

# what it does, its posture, its state
ACTIONS = """
sitting/seated/sits standing/stands lying/lies/reclining kneeling/crouching walking/walks running/runs \
jumping/leaping swimming/swims flying/flies
eating/eats drinking/drinks sleeping/asleep/sleeps cooking/cooks reading/reads writing/writes \
dancing/dances singing/sings painting
holding/holds/carrying throwing/throws kicking/kicks pushing/pulling catching
riding/rides driving/drives
smiling/laughing/smiles/grinning crying frowning yawning
open/opened closed/shut
empty full/filled
wet dry
lit unlit
parked moving
folded unfolded
"""

SCENES = """
indoors/indoor/inside outdoors/outdoor/outside
daytime/day/daylight/midday night/nighttime/nightfall
sunny/clear cloudy/overcast rainy/raining/stormy snowy/snowing foggy/misty
kitchen bathroom bedroom office classroom garage library supermarket/store/shop restaurant/cafe gym \
hallway
beach/seashore/coast forest/woods/woodland desert street/road/city/town mountains/mountain \
field/meadow/lawn harbor/marina park/garden farm
summer winter autumn/fall spring
sunset/dusk/twilight noon sunrise/dawn
"""

STYLES = """
photograph/photo/photography painting drawing/sketch/illustration cartoon/anime \
render/rendering/rendered engraving/etching
black-and-white/monochrome/grayscale colorful/vivid
close-up/closeup/macro wide-angle/wide panoramic/panorama
blurry/blurred/out-of-focus sharp/in-focus
bright/overexposed dim/underexposed
horizontal vertical
"""

# things that could stand in each other's place
OBJECTS = """
man/gentleman/guy woman/lady boy girl baby/infant/toddler
dog/puppy cat/kitten rabbit/bunny hamster horse/pony/foal cow/bull/calf/cattle sheep/lamb goat \
pig/piglet
elephant giraffe zebra lion tiger bear monkey
bird/sparrow/pigeon/gull/seagull duck/goose/swan chicken/hen/rooster owl/hawk/eagle parrot
butterfly/moth bee/wasp spider beetle
fish turtle/tortoise crab frog shark dolphin
car/sedan/taxi truck/lorry/pickup bus/van train/locomotive/tram motorcycle/scooter bicycle/bike \
airplane/plane/jet helicopter boat/sailboat/ship/canoe rocket
chair/armchair/stool table/desk sofa/couch/bench bed shelf/bookshelf/cabinet/cupboard dresser/wardrobe
cup/mug glass/tumbler bottle/jar bowl plate/dish/saucer teapot/kettle/pot pan/skillet
fork knife spoon/ladle chopsticks
apple orange banana pear strawberry/raspberry grape lemon/lime pineapple watermelon/melon cherry
carrot tomato potato onion broccoli cucumber pepper corn mushroom lettuce/cabbage
bread/toast/loaf/bun pizza sandwich/burger/hamburger cake/cupcake/muffin cookie/biscuit soup salad \
pasta/spaghetti/noodles rice
coffee/espresso tea juice milk wine beer water
laptop/computer phone/smartphone/cellphone television/tv/monitor/screen keyboard camera radio \
clock/watch
book/notebook newspaper/magazine letter/envelope map poster/banner
hat/cap/helmet scarf glove glasses/sunglasses/goggles tie shirt/t-shirt/blouse/sweater/jumper \
dress/skirt jacket/coat/suit trousers/pants/jeans/shorts shoe/boot/sneaker/sandal \
backpack/bag/handbag/purse umbrella
ball/football/basketball bat/racket skateboard surfboard kite frisbee guitar/violin piano drum \
trumpet/flute
tree/bush/palm flower/rose/tulip/daisy/sunflower cactus grass
house/cottage/cabin/barn church/cathedral/chapel tower/skyscraper bridge castle tent lighthouse
window door/doorway wall/fence roof stairs/staircase ladder
mountain/hill river/stream lake/pond sea/ocean waterfall cloud moon sun
lamp/lantern/candle mirror vase pillow/cushion blanket curtain rug/carpet towel
hammer wrench/spanner screwdriver saw scissors drill
doll/teddy robot balloon puzzle
astronaut firefighter/fireman policeman/officer soldier chef/cook doctor/nurse
"""

OPPOSITES = (  # of relations; the first word is what the others are told from
    ("to the left of", "to the right of"),
    ("left of", "right of"),
    ("on the left", "on the right"),
    ("at the left", "at the right"),
    ("in the left", "in the right"),
    ("left side", "right side"),
    ("left hand", "right hand"),
    ("on top of", "underneath"),
    ("at the top", "at the bottom"),
    ("top left", "bottom left"),
    ("top right", "bottom right"),
    ("upper", "lower"),
    ("above", "below"),
    ("over", "under"),
    ("in front of", "behind"),
    ("in the foreground", "in the background"),
    ("inside", "outside"),
    ("into", "out of"),
    ("toward", "away from"),
    ("towards", "away from"),
)
PLACES = (  # relations without an opposite word: each group excludes the others
    ("on top of", "on", "atop"),
    ("under", "underneath", "beneath", "below"),
    ("behind",),
    ("in front of",),
    ("next to", "beside", "near", "by", "alongside", "adjacent to", "close to"),
    ("inside", "in", "within"),
)
# by these words alone a statement is about where things are
RELATIONS = (
    r"(?:to the )?(?:left|right) of|"
    r"(?:left|right|top|bottom|upper|lower)[- ](?:side|corner|left|right|half|edge|part)|"
    r"(?:on|at|in|to) the (?:far )?"
    r"(?:left|right|top|bottom|cent(?:er|re)|middle|side|edge|foreground|background|corner)|"
    r"above|below|under|underneath|beneath|behind|in front of|beside|next to|near|between|inside|outside of|"
    r"on top of|atop|over|alongside|adjacent to|close to|far from|around|surround(?:ed|ing)|against|"
    r"across from|opposite|among|amid|along|attached to|leaning|hanging|facing|touching|overlap\w*|"
    r"connected to|covered (?:in|with|by)|filled with|full of|upper|lower"
)
# words in -ing that are no action
THINGS_IN_ING = """
building ceiling evening morning clothing railing ring earring king string wing spring awning lighting thing
something nothing everything anything icing frosting topping filling stuffing lightning pudding dumpling
wedding crossing parking landing swing siding bedding flooring covering opening marking setting sling
seasoning serving being sibling duckling outing meeting offering paneling tubing wiring piping plumbing
interesting striking stunning charming amazing engraving drawing rendering etching during wide-ranging
"""
CLOTHES = """
shirt t-shirt blouse sweater jumper dress skirt jacket coat suit trousers pants jeans shorts uniform hat cap
helmet scarf hoodie vest robe costume glasses sunglasses apron boots shoes clothes clothing outfit gown tie
"""
# pairs that a photograph leaves open
TOO_NEAR = """
red-orange red-pink orange-yellow orange-brown blue-purple purple-pink black-gray white-gray
white-yellow brown-black man-boy woman-girl girl-boy girl-baby boy-baby cow-horse sheep-goat duck-bird
hawk-bird bee-butterfly bus-truck chair-sofa table-shelf shelf-dresser plate-bowl bowl-cup teapot-cup
fork-spoon bread-cake cake-cookie coffee-tea juice-milk laptop-keyboard laptop-television book-newspaper
jacket-shirt dress-shirt scarf-tie tree-grass house-church house-castle house-tower wall-window
mountain-cloud river-lake river-sea lake-sea lamp-mirror blanket-towel blanket-rug blanket-curtain
pillow-blanket wrench-screwdriver drawing-cartoon drawing-engraving drawing-painting photograph-render
wide-angle-panoramic summer-spring kitchen-restaurant office-library sunny-daytime sunset-sunrise
lying-sleeping sitting-kneeling walking-running eating-drinking holding-catching reading-writing
stone-ceramic plastic-ceramic plastic-fabric glass-plastic leather-plastic leather-fabric round-oval
square-triangular
"""
# plural:singular
IRREGULAR = """
men:man women:woman children:child people:person mice:mouse geese:goose knives:knife shelves:shelf
loaves:loaf wolves:wolf leaves:leaf calves:calf gentlemen:gentleman ladies:lady babies:baby puppies:puppy
ponies:pony bunnies:bunny lorries:lorry berries:berry strawberries:strawberry raspberries:raspberry
cherries:cherry butterflies:butterfly daisies:daisy canoes:canoe shoes:shoe policemen:policeman
firemen:fireman buses:bus glasses:glass dresses:dress
"""
SAME_PLURAL = """
sheep fish cattle sunglasses goggles pants jeans shorts trousers scissors chopsticks noodles grass stairs
"""
SIGN_WORDS = (
    "OPEN",
    "EXIT",
    "STOP",
    "SALE",
    "TAXI",
    "CAFE",
    "HOTEL",
    "MARKET",
    "POLICE",
    "ONE WAY",
    "WELCOME",
)
