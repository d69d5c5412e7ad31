"""Draw the figures of the lessons, load a lesson as a module, and check exercises."""
import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parent

def load(name):
    """Return a file as a module, as load('1_policy_gradient'); its name may begin with a digit."""
    spec = importlib.util.spec_from_file_location(f"lesson_{name.replace('/', '_')}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def passes(check, function):
    """Return whether a check accepts a function; one that fails in it is not accepted."""
    try:
        return bool(check(function))
    except Exception: # of a function that is not filled in, whatever it does
        return False

def tell_exercises(lesson):
    """Print which exercises are done; lesson: the variables of its file, with CHECKS = {function: check}."""
    for name, check in lesson['CHECKS'].items():
        print(f"exercise {name}: {'right' if passes(check, lesson[name]) else 'not right yet'}")

def draw(name, *plots):
    """Write out/lessons/NAME.png, a panel by each function of axes; without matplotlib say so and go on."""
    try:
        import matplotlib
    except ImportError:
        return print("(no figure: pip install matplotlib to see it)")
    from lab.figures import panels
    out = HERE.parent / 'out' / 'lessons'
    out.mkdir(parents=True, exist_ok=True)
    with panels(str(out / f"{name}.png"), len(plots), 4.8, 3.8) as axes:
        for ax, plot in zip(axes, plots):
            plot(ax)
