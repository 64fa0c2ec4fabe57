// Shown beside each view, once for each: where this does not run, the view works all the same.
(() => {
    const set = (node, name, value) => node.getAttribute(name) === value || node.setAttribute(name, value);

    // ipywidgets gives a slider no name and only an index as its value, a picture no text, and says no change aloud.
    const name = view => {
        for (const handle of view.querySelectorAll("[role=slider], .ui-slider-handle")) {
            const [label, readout] = [".widget-label", ".widget-readout"].map(
                part => handle.closest(".widget-hslider")?.querySelector(part)?.textContent ?? "");
            set(handle, "role", "slider");
            set(handle, "aria-label", label);
            set(handle, "aria-valuetext", readout);
        }
        for (const choice of view.querySelectorAll(".widget-toggle-buttons")) {
            set(choice, "role", "group");
            set(choice, "aria-label", choice.querySelector(".widget-label")?.textContent ?? "");
            for (const button of choice.querySelectorAll("button"))
                set(button, "aria-pressed", `${button.classList.contains("mod-active")}`);
        }
        const asked = view.querySelector(".gradaccum-asks .widget-html-content");
        if (asked) {
            set(view, "role", "group");
            set(view, "aria-label", asked.textContent);
        }
        for (const text of view.querySelectorAll(".gradaccum-says .widget-html-content")) {
            set(text, "aria-live", "polite");
            view.querySelectorAll("img").forEach(picture => set(picture, "alt", text.textContent.trim()));
        }
    };

    // After a guess the focus goes on to JupyterLab's next cell, so that Shift+Enter runs that: in a box the key does
    // nothing, at a button it asks again. It stays while another question of the cell is open, and where a guess is
    // taken because the reader leaves the box: they are on their way elsewhere. It does not wait for the kernel to take
    // the guess: a screen reader would break off that sentence when the focus moves.
    const asks = view => view.querySelector(".gradaccum-asks");
    const guessed = (view, pressed) => {
        const [box, button] = ["input", "button"].map(kind => view.querySelector(kind));
        if (box && !box.value.trim()) {
            if (pressed === box) button.click();  // Enter sends nothing new, and the sentence would not come
            return;
        }
        const views = [...view.closest(".jp-Cell")?.querySelectorAll(".gradaccum-view") ?? []];
        const open = views.some(other => other !== view && asks(other) && !other.querySelector(".gradaccum-taken"));
        if (!open && !view.closest(".jupyter-widgets-disconnected")) goOn(view);
    };
    const nextOf = cell => {
        // JupyterLab may not have drawn it yet: the node that comes next is then another cell's.
        const at = Number(cell?.dataset.windowedListIndex) + 1;
        return at ? cell.parentElement.querySelector(`[data-windowed-list-index="${at}"]`) : cell?.nextElementSibling;
    };
    const goOn = (view, frames = 60) => {
        const cell = view.closest(".jp-Cell");
        if (!cell?.contains(document.activeElement)) return;
        const next = nextOf(cell);
        const drawn = next?.offsetHeight > 0;
        if (drawn) next.focus({preventScroll: true});  // a long cell would push the question off the page
        view.scrollIntoView({block: drawn ? "nearest" : "center"});
        if (!drawn && frames) requestAnimationFrame(() => goOn(view, frames - 1));
    };
    // Who has just run a question with Shift+Enter is on the next cell, where what they type would be commands: they
    // are taken to the box or the first choice. Who has gone further meanwhile is left alone.
    const takeTo = view => {
        const first = asks(view) && view.querySelector("input, button"), active = document.activeElement;
        if (!first || "reached" in view.dataset) return;  // its parts come one after the other
        view.dataset.reached = "";
        const next = active?.classList.contains("jp-Cell") && active === nextOf(view.closest(".jp-Cell"));
        if (next && !view.querySelector(".gradaccum-taken")) first.focus();
    };
    const listen = view => {
        // There the same keys go on, with the guess that is typed or without one; JupyterLab would ask again.
        view.addEventListener("keydown", event => {
            if (event.key !== "Enter" || !event.shiftKey || !asks(view) || !view.closest(".jp-Cell")) return;
            event.preventDefault();
            event.stopPropagation();
            goOn(view);
        }, true);
        // To JupyterLab the arrows mean another cell; among choices they go to the next one, as in any list.
        view.addEventListener("keydown", event => {
            const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], buttons = [...view.querySelectorAll("button")];
            if (!step || !asks(view) || buttons.length < 2 || !buttons.includes(event.target)) return;
            event.preventDefault();
            event.stopPropagation();
            const open = buttons.filter(button => !button.disabled);
            open[(open.indexOf(event.target) + step + open.length) % open.length].focus();
        }, true);
        const later = pressed => pressed && asks(view) && setTimeout(guessed, 0, view, pressed);
        // On the way down, since ipywidgets lets no key of a box come up; later, since Enter has yet to send the text.
        view.addEventListener("keypress", event => event.key === "Enter" && later(event.target.closest("input")), true);
        view.addEventListener("click", event => later(event.target.closest("button")));
    };

    const found = () => {
        const views = document.querySelectorAll(".gradaccum-view:not([data-named])");
        for (const view of views) {
            view.dataset.named = "";
            new MutationObserver(() => { name(view); takeTo(view); }).observe(
                view, {subtree: true, childList: true, characterData: true, attributeFilter: ["aria-valuetext", "class"]});
            name(view);
            listen(view);
            takeTo(view);
        }
        return views.length;
    };
    if (found()) return;
    const wait = new MutationObserver(() => found() && wait.disconnect());  // the view may come after this
    wait.observe(document.body, {subtree: true, childList: true});
    setTimeout(() => wait.disconnect(), 60000);
})()
